# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What is in flight in this process on one pool: reaped, answered and woken from one epoll.

Guarantees:

* No thread of our own. Of the threads that wait, one (the leader) polls for all; the others
  (followers) sleep on a lock each. Whoever stops waiting passes the lead on, so a thread that
  waits is never without somebody who polls.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Sequence
from typing import Any, Callable, Optional

from . import _forking
from ._books import Books, active
from ._crew import Crew
from ._signals import Deferred, deferred
from ._sleeper import Sleeper, pause_until
from ._slots._own import own_slot
from ._slots._pool import SlotPool
from ._spin import Spin

# A worker that has answered is gone within a millisecond, unless it has been stopped.
_LAST_REAP = 0.2
# Who waits less than so many seconds has no time to spin.
_HURRY = 0.001


class Reactor(Books):
    """Wait for news of the jobs that this process has submitted to ``slots``, and pass it on."""

    def __init__(self, slots: SlotPool, crew: Crew) -> None:
        super().__init__(slots, crew)
        self._spin = Spin()
        _forking.track(self, at_leisure=True)

    def reap(self, *, keep: bool = False) -> None:
        """
        Take note of all that has ended, without waiting.

        Args:
            keep: The caller is about to take a token, and to have the rest unloaded.
        """
        if self.poller.watched:
            with deferred():
                self.look()
                if not keep:
                    self.unload()

    def look(self) -> None:
        """Do so for a caller who has signals wait, keeping tokens."""
        poller = self.poller
        with self.lock:
            if self._leading:
                try:
                    poller.prepare_nudge()
                except OSError:
                    return  # no descriptor to tell the leader by, who so must see to it himself
            events = (poller.epoll or poller.get()).poll(0)
            if events and self._handle(events) and self._leading:
                self._nudge_leader()

    def wait(
        self,
        test: Callable[[], bool],
        deadline: Optional[float],
        *,
        target: Optional[object] = None,
        arm: Sequence[int] = (),
        tick: Optional[float] = None,
        on_tick: Callable[[], Any] = lambda: None,
        keep: bool = False,
        looked: bool = False,
    ) -> bool:
        """
        Wait until ``test()`` holds.

        Args:
            test: Called under the lock, whenever something may have changed.
            deadline: The ``time.monotonic`` instant at which to give up; None for never.
            target: The future, or sink of futures, that the test is about.
            arm: More descriptors whose readability is a reason to test again.
            tick: After so many seconds of fruitless waiting ...
            on_tick: ... call this, again and again.
            keep: See ``reap``.
            looked: The caller has just reaped, or there is no deadline: what can be known without
                waiting need not be looked for first.

        Returns:
            What the last test said.
        """
        with deferred() as signals:
            return self._wait(signals, test, deadline, target, arm, tick, on_tick, keep, looked)

    def _wait(
        self,
        signals: Deferred,
        test: Callable[[], bool],
        deadline: Optional[float],
        target: Optional[object],
        arm: Sequence[int],
        tick: Optional[float],
        on_tick: Callable[[], Any],
        keep: bool,
        looked: bool,
    ) -> bool:
        sleeper = None
        me = threading.get_ident()
        # In a signal handler, which has interrupted this very thread while it polled.
        nested = self._leading == me
        leading = False
        try:
            while True:
                if not looked:
                    with self.lock:
                        if test():
                            return True
                    looked = True
                    self.reap(keep=True)  # also if another thread leads, or there is no time left
                with self.lock:
                    if test():
                        return True
                    self.crew.unload()
                    pause = pause_until(deadline, tick)
                    if pause is not None and pause <= 0:
                        return False
                    for fd in arm:
                        self.poller.arm(fd)
                    if nested:
                        self._prepare_nudge()  # for the end of this wait
                    leading = leading or nested or not self._leading
                    if leading:
                        self._leading = me
                    elif sleeper is None:
                        sleeper = Sleeper(target, seeks=bool(arm))
                        self._followers[sleeper] = None
                poller = self.poller.get()
                if leading or sleeper is None:
                    fruitless = self._lead(signals, poller, pause)
                else:
                    with signals.lifted():
                        fruitless = sleeper.sleep(pause)
                if fruitless and tick is not None:
                    on_tick()
        finally:
            with self.lock:
                if not keep:
                    self.crew.unload()
                if sleeper is not None:
                    self._followers.pop(sleeper, None)
                if nested:
                    self._nudge_leader()  # what it polls for may have been taken here
                elif leading:
                    self._leading = 0
                if not self._leading:
                    if self._followers:
                        # The last one, as only that may be waiting in a handler of its thread.
                        next(reversed(self._followers)).wake()
                    else:
                        self._retire()

    def _lead(self, signals: Deferred, poller: select.epoll, pause: Optional[float]) -> bool:
        closings = self.poller.closings
        try:
            with signals.lifted():
                events = self._poll(poller, pause)
        except BaseException:
            # Ctrl-C just after it: what was armed for one shot may have been spent.
            with self.lock:
                self.poller.spent_perhaps()
            raise
        with self.lock:
            if closings != self.poller.closings:
                # Another thread has closed descriptors since, and what is reported of a number may
                # concern another file than the one that bears it now. So look again; only what is
                # armed for one shot would not be reported twice, and does no harm if it is wrong.
                known = self.poller.watched
                self._handle([event for event in events if event[0] not in known], leader=True)
                self._handle(poller.poll(0), leader=True)
            else:
                self._handle(events, leader=True)
        return not events

    def _poll(self, poller: select.epoll, pause: Optional[float]) -> list[tuple[int, int]]:
        if pause is not None and pause < _HURRY:
            return poller.poll(pause)
        return self._spin.wait(lambda: poller.poll(0), lambda: poller.poll(pause))

    def _handle(self, events: Sequence[tuple[int, int]], *, leader: bool = False) -> bool:
        settled = False
        watched = self.poller.watched
        for fd, _mask in events:
            flight = watched.get(fd)
            if flight is None:
                if not self.poller.nudged(fd, take=leader):
                    self.poller.spent(fd)
                    self.wake_seekers()
                    settled = True
                continue
            if fd == flight.channel:
                flight.on_channel()
            elif fd == flight.pidfd:
                flight.on_exit()
                if flight.lingers:
                    self._lingering -= 1
                    settled = self._wake_last() or settled
            if flight.future is None:
                if not flight.lingers and self.crew.leave(flight) and not flight.exited:
                    self._dismiss(flight)
            elif flight.frame is not None or flight.exited:
                self._settle(flight.future, flight)
                settled = True
        if self._dropped and not self.running:
            self._dissolve()  # there is nobody left who could use the workers at rest
        if not watched:
            active.discard(self)
            if self.closed or self._dropped:
                self._release()
        return settled

    def _wake_last(self) -> bool:
        """Let go on who waits for processes to be gone; says whether the last one is."""
        if self._lingering:
            return False
        for sleeper in self._followers:
            if sleeper.target is None:
                sleeper.wake()
        return True

    def disarm(self, fd: int) -> None:
        """Forget an armed descriptor that is about to be closed."""
        with deferred(), self.lock:
            self.forget(fd)

    def forget(self, fd: int) -> None:
        """Do so under the lock; -1 is none."""
        if fd >= 0:
            self.poller.disarm(fd)

    def slot_came_free(self) -> None:
        """A thread has put its slot down, under the lock: tell those that seek one."""
        self.wake_seekers()
        self._nudge_leader()
        self._retire()

    def reap_lingering(self, seconds: float) -> None:
        """Wait, not longer than ``seconds``, for the processes of finished jobs to be gone."""
        self.wait(lambda: not self._lingering, time.monotonic() + seconds)

    def drop(self) -> None:
        """The last handle is gone; called by finalizers, so perhaps from within our own code."""
        self._dropped = True
        if not self.lock._is_owned() and self.lock.acquire(blocking=False):
            try:
                self._retire()
            finally:
                self.lock.release()

    def revive(self) -> None:
        """There is a handle again, though the last one was gone."""
        self._dropped = False

    def _retire(self) -> None:
        """If nobody will ever come by again, reap what is about to end, and let go."""
        if self._leading or self.running or not (self.closed or self._dropped):
            return
        self._dissolve()
        end = time.monotonic() + _LAST_REAP
        while self.poller.watched and time.monotonic() < end:
            self._handle(self.poller.get().poll(end - time.monotonic()))
        self._release()

    def close(self) -> None:
        """Take no more work; let go of all descriptors once the last job in flight has ended."""
        with deferred(), self.lock:
            self.closed = True
            self._dissolve()
            self._release()
            self._nudge_leader()

    def _release(self) -> None:
        # A lease in hand belongs to a job that is just being started.
        if self._leading or self.poller.watched or self.slots.held_fds:
            return
        self.poller.close()
        # A job on this pool has its own slot to return, at its very end.
        if not own_slot().attach(self.slots):
            self.slots.close()

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """Forget what the parent has in flight; its descriptors are closed already."""
        self._forget_all()
        active.discard(self)


def active_reactors() -> list[Reactor]:
    """Return the reactors that have something in flight."""
    return list(active)
