# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What is in flight in this process on one pool: reaped, answered and woken from one epoll.

Guarantees:

* No thread of our own. Of the threads that wait, one (the leader) polls for all; the others
  (followers) sleep on a lock each. Whoever stops waiting passes the lead on, so a thread that
  waits is never without somebody who polls.
* A future's outcome is set once, under ``lock``, after its slot has gone back.
* A thread that settles something while another leads nudges the leader, which polls for events
  that have already been taken.
* No code of the user runs under ``lock``: results are unpickled and callbacks issued elsewhere.
"""

from __future__ import annotations

import select
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from . import _forking
from ._crew import Crew
from ._flight import Flight, Started
from ._outcome import Outcome
from ._poller import Poller
from ._signals import Deferred, deferred
from ._sleeper import Sleeper, pause_until
from ._slots._lease import Lease
from ._slots._own import own_slot
from ._slots._pool import SlotPool
from ._wire import RETURNED

if TYPE_CHECKING:
    from ._future import Future

# A worker that has answered is gone within a millisecond, unless it has been stopped.
_LAST_REAP = 0.2

# Reactors with jobs in flight, so that the end of the process can wait for them all.
_active: set[Reactor] = set()


class Reactor:
    """Track the jobs that this process has submitted to ``slots``."""

    def __init__(self, slots: SlotPool, crew: Crew) -> None:
        self.slots = slots
        self.crew = crew
        # Reentrant, as a signal handler may call us wherever it interrupts its thread.
        self.lock: Any = threading.RLock()
        # Futures whose callbacks are due, oldest first.
        self.ready: deque[Future[Any]] = deque()
        # Futures that this job, having lent its slot, waits for: it goes on with their slot.
        self.claimed: set[Future[Any]] = set()
        # Threads that wait for this job's own slot to come back from anywhere.
        self.starving: int = 0
        self.closed: bool = False
        self._dropped = False  # there is no handle any more that could submit
        self.running: dict[Future[Any], Flight] = {}
        self.poller: Poller = Poller()
        self._lingering = 0  # workers that have answered and are not reaped yet
        self._leading = 0  # the thread that polls for all; 0 for none
        self._followers: dict[Sleeper, None] = {}
        _forking.track(self, at_leisure=True)

    def add(self, future: Future[Any], started: Started, lease: Optional[Lease]) -> None:
        """Track a job that has just been started."""
        flight = Flight(started, lease, self.poller.unwatch, future)
        with deferred(), self.lock:
            try:
                self.poller.watch(flight.channel, flight)
                if flight.pidfd >= 0:
                    self.poller.watch(flight.pidfd, flight)
            except BaseException:
                if flight.channel in self.poller.watched:
                    self.poller.unwatch(flight.channel)
                flight.forget()  # its descriptors are the caller's to close
                raise
            self.running[future] = flight
            _active.add(self)

    def assign(self, future: Future[Any], flight: Flight, lease: Lease) -> None:
        """Track a job that has been sent to a worker that had run others; it may have ended."""
        with deferred(), self.lock:
            lease.worker = None
            flight.let_go()
            seat, flight.seat, flight.known = flight.seat, None, lease
            if seat is not None and seat is not lease:
                seat.release()
            flight.future = future
            flight.lease = lease
            self.running[future] = flight
            if flight.settled:
                self._settle(future, flight)
                self.wake_seekers()
                self._nudge_leader()

    def dismiss(self, lease: Lease) -> None:
        """Let the worker end that was in the hand of this thread, with ``lease``."""
        with deferred(), self.lock:
            flight, lease.worker = lease.worker, None
            if flight is not None:
                flight.let_go()
                if flight.seat is lease:
                    flight.seat = None
                self.crew.unseat(flight)
                self._dismiss(flight)

    def _dismiss(self, flight: Flight) -> None:
        flight.close_channel()
        if flight.pidfd >= 0 and not flight.lingers:
            flight.lingers = True
            self._lingering += 1

    def put_back(self, lease: Lease) -> None:
        """Let the worker rest again that was in the hand of this thread, with ``lease``."""
        with deferred(), self.lock:
            flight, lease.worker = lease.worker, None
            flight.let_go()
            gone = flight.channel < 0 or flight.exited or self.closed
            if gone or not self.crew.rest(flight, lease):
                lease.release()
                self._dismiss(flight)
            self.crew.unload()
            self.wake_seekers()

    def dissolve(self) -> None:
        """Let all workers at rest end."""
        with deferred(), self.lock:
            self._dissolve()

    def unload(self) -> None:
        """Put back the tokens that workers at rest still have."""
        if self.crew:
            with deferred(), self.lock:
                self.crew.unload()

    def _dissolve(self) -> None:
        for flight in self.crew.dissolve():
            self._dismiss(flight)

    def reap(self, *, keep: bool = False) -> None:
        """
        Take note of all that has ended, without waiting.

        Args:
            keep: The caller is about to take a token, and to have the rest unloaded.
        """
        if not self.poller.watched:
            return
        with deferred(), self.lock:
            try:
                self._prepare_nudge()
            except OSError:
                return  # no descriptor to tell the leader by, who so must see to it himself
            if self._handle(self.poller.get().poll(0)):
                self._nudge_leader()
            if not keep:
                self.crew.unload()

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

        Returns:
            What the last test said.
        """
        with deferred() as signals:
            return self._wait(signals, test, deadline, target, arm, tick, on_tick, keep)

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
    ) -> bool:
        sleeper = Sleeper(target, bool(arm))
        me = threading.get_ident()
        # In a signal handler, which has interrupted this very thread while it polled.
        nested = self._leading == me
        leading = polled = False
        try:
            while True:
                if not polled:
                    with self.lock:
                        if test():
                            return True
                    polled = True
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
                    else:
                        self._followers[sleeper] = None
                poller = self.poller.get()
                if leading:
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
                events = poller.poll(pause)
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

    def _handle(self, events: Sequence[tuple[int, int]], *, leader: bool = False) -> bool:
        settled = False
        for fd, _mask in events:
            flight = self.poller.watched.get(fd)
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
                self._lingering -= flight.lingers
            if flight.future is None:
                if not flight.lingers and self.crew.leave(flight) and not flight.exited:
                    self._dismiss(flight)
            elif flight.settled:
                self._settle(flight.future, flight)
                settled = True
        if not self.poller.watched:
            _active.discard(self)
            if self.closed or self._dropped:
                self._release()
        return settled

    def _prepare_nudge(self) -> None:
        if self._leading:
            self.poller.prepare_nudge()

    def _nudge_leader(self) -> None:
        if self._leading:
            self.poller.prepare_nudge()
            self.poller.nudge()

    def _settle(self, future: Future[Any], flight: Flight) -> None:
        flight.future = None
        del self.running[future]
        lease, flight.lease = flight.lease, None
        gone = flight.exited or flight.signalled or self.closed or self._dropped
        if lease is not None:
            lease = self._slot_back(future, flight, lease)
        if gone or not (flight.stays and self.crew.rest(flight, lease)):
            if lease is not None:
                lease.release()
            self._dismiss(flight)
        death = flight.death() if flight.frame is None else None
        future._outcome = Outcome(flight.frame, death)
        flight.frame = None
        if future._callbacks:
            self.ready.append(future)
        if future._sink is not None:
            future._sink.append(future)
        for sleeper in self._followers:
            target = sleeper.target
            # Callbacks are for anybody who waits: the leader may be where it must issue none.
            if future._callbacks or target is None or target is future or target is future._sink:
                sleeper.wake()

    def _slot_back(self, future: Future[Any], flight: Flight, lease: Lease) -> Optional[Lease]:
        """Return the lease if its token is there, and nobody here waits for it."""
        own = own_slot()
        frame = flight.frame
        mine = lease.reclaim() if frame is None else not frame.flags & RETURNED
        if not mine:
            lease.abandon()
        elif own.lent and own.attach(self.slots) and self._wanted(future):
            own.lease = lease
            self.wake_seekers()
        else:
            return lease
        return None

    def lends_below(self) -> bool:
        """Say whether a child runs on a slot, which it will bring back."""
        return any(flight.lease is not None for flight in self.running.values())

    def _wanted(self, future: Future[Any]) -> bool:
        # Callbacks are this job's own work, for which it must hold a slot.
        return bool(self.starving or future in self.claimed or future._callbacks)

    def wake_seekers(self) -> None:
        """Let every follower that seeks a slot test again."""
        for sleeper in self._followers:
            if sleeper.seeks:
                sleeper.wake()

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
        self.poller.forget()
        for future in self.running:
            future._foreign = True
        self.crew.forget()
        self.lock = threading.RLock()
        self.ready = deque()
        self.claimed = set()
        self.starving = 0
        self.running = {}
        self._lingering = 0
        self._leading = 0
        self._followers = {}
        _active.discard(self)


def active_reactors() -> list[Reactor]:
    """Return the reactors that have something in flight."""
    return list(_active)
