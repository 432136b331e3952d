# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Who may go on: gating, waiting for a slot, and lending one's own.

Guarantees (I3, progress):

* A job that is blocked in a submission without a timeout, with no token free, lends its own token
  to the child that it is submitting, and leaves the submission when it holds a token again.
* A job that waits without a timeout for a child of its own puts its token into the pool meanwhile,
  if it was told to (``lend=True``) or if somebody below it starves (see ``_slots._own``). It keeps
  the child's token when the child has ended.
* A job starves when it is blocked without a token and without a child that runs on one. Its ringing
  goes up, past all who are blocked without a token themselves, to all who wait with one.
* So no job ever waits while it holds a token that somebody it waits for needs: the leaves of the
  tree of waiting processes always run. ``tests/lending_model.py`` explores that exhaustively.
* A wait with a timeout never lends: the token could not be had back in time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Optional

from ._callbacks import issue_due, issuing
from ._check import check_pause
from ._errors import Blocked
from ._signals import deferred
from ._slots._held import current_slot
from ._slots._lease import Lease
from ._slots._own import OwnSlot, own_slot

if TYPE_CHECKING:
    from ._future import Future
    from ._reactor import Reactor

# A waiter looks for the tokens of dead holders after each so many seconds of fruitless waiting.
TICK = 0.2
# How often a waiter asks whether there is something to do early.
_GLANCE = 0.05


class Admission:
    """The waiting side of one reactor."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor

    def reap(self) -> None:
        """Take note of what has ended, and issue its callbacks."""
        reactor = self.reactor
        reactor.reap()
        if reactor.ready:
            issue_due(reactor)

    def reap_keeping(self) -> None:
        """Do so for who is about to take a token, and has signals wait."""
        reactor = self.reactor
        if reactor.poller.watched:
            reactor.look()
        if reactor.ready:
            issue_due(reactor)

    def gate(self, sleep_fn: Callable[[], Optional[float]], deadline: Optional[float]) -> None:
        """Ask ``sleep_fn`` until it lets the work in; reaps meanwhile."""
        self.reactor.unload()
        while True:
            pause = check_pause(sleep_fn())
            if pause is None:
                return
            self._pause(time.monotonic() + pause, deadline)

    def _pause(self, until: float, deadline: Optional[float]) -> None:
        """Reap and issue callbacks until an instant; Blocked if the deadline comes before it."""
        late = deadline is not None and deadline < until
        end = min(until, deadline) if deadline is not None else until
        while True:
            issue_due(self.reactor)
            # An endless pause (inf) is slept in days, which epoll can count.
            step = min(end, time.monotonic() + 86400)
            if not self.reactor.wait(self.callbacks_due, step) and time.monotonic() >= end:
                break
        if late:
            raise Blocked("sleep_fn did not let the work in within the timeout")

    def callbacks_due(self) -> bool:
        """Say whether this thread should issue callbacks."""
        return bool(self.reactor.ready) and not issuing()

    def take(
        self,
        taken: list[Lease],
        deadline: Optional[float],
        until: Optional[Future[Any]] = None,
        early: Optional[Callable[[], bool]] = None,
        tick: float = TICK,
    ) -> None:
        """
        Wait for a slot for a child; a job without a deadline lends its own if there is no other.

        The caller has reaped just before, and has signals wait.

        Args:
            taken: Where to put it: the caller's, who gives back what is there if anything is raised
                before somebody else has it. Ctrl-C could come between two bytecodes, so that what
                is returned would be nobody's.
            deadline: The ``time.monotonic`` instant at which to give up.
            until: Give up as well, taking nothing, when this future is done.
            early: Likewise, when this says so; it is asked at each tick.
            tick: After so many seconds of fruitless waiting, again and again.

        Raises:
            Blocked: There was none in time.
            CallbackRaised: A callback failed meanwhile; nothing is taken.
        """
        reactor = self.reactor
        crew = reactor.crew
        with reactor.lock:
            if not (reactor.closed or reactor.ready or (until is not None and until._outcome)):
                lease = crew.try_take()
                if lease is not None:
                    taken.append(lease)
            if crew.loaded:
                crew.unload()
        if not taken:
            self._wait_to_take(taken, deadline, until, early, tick)

    def _wait_to_take(
        self,
        taken: list[Lease],
        deadline: Optional[float],
        until: Optional[Future[Any]],
        early: Optional[Callable[[], bool]],
        tick: float,
    ) -> None:
        reactor, slots = self.reactor, self.reactor.slots
        own = current_slot(slots)
        crew = reactor.crew
        lends = deadline is None and own.attach(slots)
        bell = Bell(own)

        def over() -> bool:
            if until is not None and until._outcome is not None:
                return True
            return early is not None and early()

        def test() -> bool:
            self.refuse_closed()
            # Callbacks first: the slot that has come back is theirs to submit on.
            if self.callbacks_due() or over():
                return True
            lease = crew.try_take()
            if lease is None and lends:
                lease = own.lend_to_child()
                if lease is not None:
                    crew.take_for(lease)
            if lease is not None:
                taken.append(lease)
            # A job that starves rings, but only once it has looked for a slot in vain.
            return lease is not None or (not bell.rung and starves())

        def starves() -> bool:
            # Its slot is lent already, or it came without one. What a child runs on comes back.
            if not lends or own.lease is not None:
                return False
            return not own.consumes or not reactor.lends_below() or own.heard()

        looked = True  # whoever seeks a slot has just reaped
        try:
            while True:
                issue_due(reactor)
                arm = slots.filenos()
                if reactor.wait(
                    test,
                    deadline,
                    arm=bell.arm(arm) if lends else arm,
                    tick=tick,
                    on_tick=slots.sweep,
                    looked=looked,
                ):
                    if taken or over():
                        return
                    if not self.callbacks_due():
                        bell.ring()
                elif not slots.sweep():
                    raise Blocked("no slot was free within the timeout")
                looked = False
        finally:
            bell.hush()

    def give_all_back(self, taken: list[Lease], *, unheard: bool = False) -> None:
        """Return what is still there of what ``take`` has put there."""
        with deferred():
            while taken:
                self.give_back(taken.pop(), unheard=unheard)
            self.reactor.unload()

    def refuse_closed(self) -> None:
        """Raise RuntimeError if closed."""
        if self.reactor.closed:
            raise RuntimeError("Jobserver is closed")

    def give_back(self, lease: Lease, *, unheard: bool = False) -> None:
        """
        Return what ``take`` has given: there is no job for it, or none that could be started.

        Args:
            lease: What was taken.
            unheard: The worker that it leads to has been sent nothing, and can go on.
        """
        reactor = self.reactor
        if lease.worker is not None:
            if unheard and not current_slot(reactor.slots).lent:
                reactor.put_back(lease)
                return
            reactor.dismiss(lease)  # it may have heard part of the job
        with deferred(), reactor.lock:
            own = current_slot(reactor.slots)
            if own.lent and own.attach(reactor.slots):
                own.lease = lease
            else:
                lease.release()
            reactor.wake_seekers()

    def regain(self) -> None:
        """If this job has lent its slot, wait until it holds one again. Issues no callbacks."""
        reactor, slots = self.reactor, self.reactor.slots
        own = current_slot(slots)
        if not own.lent or not own.attach(slots):
            return
        bell = Bell(own)

        def test() -> bool:
            if own.lease is None:
                own.lease = slots.try_take()
            return own.lease is not None or (not bell.rung and starves())

        def starves() -> bool:
            # As long as a child runs on a slot, that will come back to us.
            return not reactor.lends_below() or own.heard()

        # The slot of a child goes to the process's own; a thread's comes from the pool.
        claims = int(own is own_slot())
        with deferred(), reactor.lock:
            reactor.starving += claims
        try:
            while own.lease is None:
                reactor.wait(
                    test, None, arm=bell.arm(slots.filenos()), tick=TICK, on_tick=slots.sweep
                )
                if own.lease is None:
                    bell.ring()
        finally:
            bell.hush()
            with deferred(), reactor.lock:
                reactor.starving -= claims

    def wait_for(
        self,
        future: Future[Any],
        deadline: Optional[float],
        early: Optional[Callable[[], bool]] = None,
        tick: Optional[float] = _GLANCE,
    ) -> bool:
        """
        Wait until ``future`` is done; issues callbacks meanwhile.

        Args:
            future: What to wait for.
            deadline: The ``time.monotonic`` instant at which to give up.
            early: Asked (under the lock) whether to go on already ...
            tick: ... after so many seconds, again and again, and when something has ended that has
                the same sink.
        """
        if future._outcome is not None and not self.reactor.ready:
            return True
        with deferred():
            if early is None:
                return self._wait(lambda: future._outcome is not None, deadline, future)
            ask = early
            return self._wait(lambda: future._outcome is not None or ask(), deadline, future, tick)

    def wait_for_all(self) -> None:
        """Wait until nothing is in flight; issues callbacks meanwhile."""
        with deferred():
            self._wait(lambda: not self.reactor.running, None, None)

    def _wait(
        self,
        over: Callable[[], bool],
        deadline: Optional[float],
        future: Optional[Future[Any]],
        tick: Optional[float] = None,
    ) -> bool:
        reactor, own = self.reactor, current_slot(self.reactor.slots)
        target = future if future is None or future._sink is None else future._sink
        can_lend = deadline is None and own.attach(reactor.slots) and own.consumes

        def test() -> bool:
            return over() or self.callbacks_due()

        def test_or_heard() -> bool:
            return test() or own.heard()

        # Without a deadline the wait begins with a poll that tells all that reaping would.
        looked = True
        if deadline is not None:
            reactor.reap()
        while True:
            issue_due(reactor)
            with reactor.lock:
                if over():
                    return True
                lend = can_lend and (self._lends(future) or own.heard())
            if lend:
                self._wait_lending(test, future, tick)
            elif can_lend:
                bell = own.bell()
                arm = (bell,) if bell >= 0 else ()
                reactor.wait(test_or_heard, None, target=target, arm=arm, tick=tick, looked=looked)
            elif not reactor.wait(test, deadline, target=target, tick=tick, looked=looked):
                return False
            looked = False

    def _lends(self, future: Optional[Future[Any]]) -> bool:
        if future is not None:
            return future._lends
        return any(running._lends for running in self.reactor.running)

    def _wait_lending(
        self, test: Callable[[], bool], future: Optional[Future[Any]], tick: Optional[float]
    ) -> None:
        reactor, own = self.reactor, current_slot(self.reactor.slots)
        bell = Bell(own)

        def heard() -> bool:
            # Somebody below starves: pass it on, or lend again what another thread got back.
            return own.heard() and (own.lease is not None or not bell.rung)

        with deferred(), reactor.lock:
            if test():
                return
            # Of several children the first to end must not bring us a slot to wait on with.
            last = set(reactor.running) if len(reactor.running) == 1 else set()
            claimed = last if future is None else {future}
            if own is not own_slot():
                claimed = set()  # a thread's slot comes from the pool
            reactor.claimed |= claimed
            mine = own.lend()
            if mine is not None:
                mine.release()
        try:
            while not reactor.wait(test, time.monotonic(), target=future):
                reactor.wait(
                    lambda: test() or heard(), None, target=future, arm=bell.arm(()), tick=tick
                )
                with deferred(), reactor.lock:
                    mine = own.lend() if heard() and not test() else None
                    if mine is not None:
                        mine.release()
                if own.heard():
                    bell.ring()
        finally:
            bell.hush()
            with deferred(), reactor.lock:
                reactor.claimed -= claimed
            self.regain()


class Bell:
    """Rings the bell of the parent, at most once at a time."""

    def __init__(self, own: OwnSlot) -> None:
        self._own = own
        self._left = False
        self.rung = False

    def ring(self) -> None:
        """Ring, and go on ringing until hushed."""
        if not self.rung:
            self.rung = True
            self._left = self._own.ring()

    def hush(self) -> None:
        """Ring no more."""
        if self._left:
            self._left = False
            self._own.hush()

    def arm(self, fds: Sequence[int]) -> Sequence[int]:
        """Return what to poll next to ``fds``: one's own bell, until it has been passed on."""
        inner = self._own.bell()
        return fds if inner < 0 or self.rung else [*fds, inner]
