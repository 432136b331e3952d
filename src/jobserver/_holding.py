# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Hold a slot for work that is done in this very process.

The rules are those of jobs (see ``_admission``): a thread that holds a slot and is blocked in a
submission without a timeout lends it to the child, and goes on when it holds one again.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Callable, Optional

from ._admission import TICK, Bell
from ._callbacks import issue_due
from ._check import check_timeout, deadline_of
from ._errors import Blocked
from ._signals import deferred
from ._slots._held import ThreadSlot, drop, held_here, hold
from ._slots._own import OwnSlot, own_slot

if TYPE_CHECKING:
    from ._shared import Shared


class Holding:
    """
    What ``Jobserver.slot`` returns: inside its with-block, the thread holds a slot.

    Args:
        shared: The pool.
        timeout: How many seconds to wait for a slot; None for as long as it takes.
    """

    def __init__(self, shared: Shared, timeout: Optional[float]) -> None:
        if timeout is not None:
            check_timeout(timeout)
        self._shared = shared
        self._canary = shared.canary()  # the pool is in use, also without any other handle
        self._timeout = timeout
        # One for each block that has been entered; None in a block that is inside another one.
        self._held: list[Optional[OwnSlot]] = []

    def __enter__(self) -> None:
        self.take(deadline_of(self._timeout))

    def __exit__(self, *exc: object) -> None:
        self.put_down()

    def take(self, deadline: Optional[float]) -> None:
        """Wait for a slot, as ``Admission.take`` does; nothing to do if the thread holds one."""
        shared = self._shared
        shared.refuse_closed()
        shared.admission.reap()
        if held_here(shared.slots) is not None:
            self._held.append(None)
            return
        found: list[OwnSlot] = []
        try:
            self._seek(deadline, found)
        except BaseException:
            for slot in found:
                self._let_go(slot)
            raise

    def _seek(self, deadline: Optional[float], found: list[OwnSlot]) -> None:
        admission, reactor, slots = self._shared.admission, self._shared.reactor, self._shared.slots
        own = own_slot()
        on_pool = own.attach(slots)
        outer_bell = own.outer_bell if on_pool else -1

        def test() -> bool:
            admission.refuse_closed()
            if admission.callbacks_due():
                return True
            if on_pool and own.lease is not None and not own.user:
                own.user = threading.get_ident()
                found.append(own)
                return True
            reactor.crew.unload()  # what workers at rest keep is free, too
            lease = slots.try_take()
            if lease is not None:
                found.append(ThreadSlot(slots, lease, outer_bell))
            return lease is not None

        bell = Bell(own)
        rings = deadline is None and on_pool and not own.consumes
        try:
            self._wait(test, deadline, found, bell if rings else None)
        finally:
            bell.hush()

    def _wait(
        self,
        test: Callable[[], bool],
        deadline: Optional[float],
        found: list[OwnSlot],
        bell: Optional[Bell],
    ) -> None:
        # A function of its own, as `_map.ending` says: Ctrl-C here must not pass the `finally`.
        reactor, slots = self._shared.reactor, self._shared.slots
        while True:
            issue_due(reactor)
            if reactor.wait(
                test,
                deadline if bell is None else time.monotonic(),
                arm=slots.filenos(),
                tick=TICK,
                on_tick=slots.sweep,
            ):
                if found:
                    hold(found[0])
                    self._held.append(found[0])
                    return
            elif bell is not None:
                bell.ring()
                bell = None
            elif not slots.sweep():
                raise Blocked("no slot was free within the timeout")

    def put_down(self) -> None:
        """Return the slot that the last ``take`` has taken."""
        slot = self._held.pop()
        if slot is not None:
            self._let_go(slot)

    def _let_go(self, slot: OwnSlot) -> None:
        reactor = self._shared.reactor
        drop(slot)
        with deferred(), reactor.lock:
            if isinstance(slot, ThreadSlot):
                lease = slot.lend()
                if lease is not None:
                    lease.release()
                reactor.forget(slot.bell())
                slot.close_bell()
            else:
                slot.user = 0
            reactor.slot_came_free()


class Resting:
    """
    While this thread waits without a timeout for others to do work, the slot it holds is free.

    For waits that are not in ``_admission``; does nothing for a thread that holds none.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._rests = False

    def __enter__(self) -> None:
        held = held_here(self._shared.slots)
        if held is not None:
            self._rests = True
            with deferred(), self._shared.reactor.lock:
                lease = held.lend()
                if lease is not None:
                    lease.release()

    def __exit__(self, *exc: object) -> None:
        if self._rests:
            self._shared.admission.regain()
