# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The slot that this very process runs on, if it is a job.

Guarantees:

* A job holds one token, or has lent it and is inside a call of ours until it holds one again.
* The token a job ends with need not be the one it began with; when it differs the job returns its
  own and says so in its answer (the RETURNED flag), and its submitter leaves the first one alone.

A job may be blocked without a slot while one above it waits, for it, with a slot in hand: a job
that came without one (``consume=0``) has none to lend; one that has lent its slot may have lost it
to somebody faster. So that it cannot starve, it rings the *bell* of its parent: a FIFO with a byte
in it for each job that is blocked without a slot and without a child that runs on one. Whoever
waits without a timeout and hears it puts his token into the pool for as long as he waits; whoever
is blocked without a token himself rings the next bell up. Bytes on a bell are hints, not tokens:
one too many (its ringer was killed) costs a needless lending, and never more.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Optional

from jobserver import _forking

from ._lease import Lease
from ._pool import SlotPool
from ._section import new_fifo
from ._splice import waiting_bytes

if TYPE_CHECKING:
    PoolKey = tuple[int, int]


class OwnSlot:
    """
    What a job runs on; guarded by the lock of the reactor of the same pool.

    Args:
        key: Which pool the slot, or the bell, belongs to; None for a process that is no job.
        fd: The descriptor of the lease, -1 for none.
        place: The section and the berth of the lease, None for none.
        bell: The FIFO to ring when blocked without a slot, -1 for none.
    """

    __slots__ = (
        "_fd",
        "_first",
        "_inner_bell",
        "_outer_bell",
        "_place",
        "consumes",
        "key",
        "lease",
        "user",
    )

    def __init__(
        self,
        key: Optional[PoolKey] = None,
        fd: int = -1,
        place: Optional[tuple[int, int]] = None,
        bell: int = -1,
    ) -> None:
        self.key = key
        self._fd = fd
        self._place = place
        self._outer_bell = bell
        self._inner_bell = -1
        self._first: Optional[Lease] = None
        self.lease: Optional[Lease] = None
        # Whether the job came with a slot (and so must hold one to go on); known when attached.
        self.consumes: bool = False
        # The thread that uses the slot for itself (``Jobserver.slot``); no other may lend it then.
        self.user = 0

    def attach(self, pool: SlotPool) -> bool:
        """Say whether this is a job on ``pool``; from then on its slot, if any, can be lent."""
        if self.key != pool.key:
            return False
        if self._first is None and self._place is not None:
            self._first = self.lease = pool.adopt(self._fd, *self._place)
            self.consumes = True
        return True

    @property
    def lent(self) -> bool:
        """Whether the job came with a slot and does not hold one now."""
        return self.consumes and self.lease is None

    @property
    def outer_bell(self) -> int:
        """The FIFO to ring when blocked without a slot, -1 for none."""
        return self._outer_bell

    def lend(self) -> Optional[Lease]:
        """Give the lease away, to be put into the pool; None if there is none to give."""
        if not self._is_mine():
            return None
        lease, self.lease = self.lease, None
        return lease

    def lend_to_child(self) -> Optional[Lease]:
        """Give the lease away, in a berth that is shared with nobody."""
        lease = self.lend()
        try:
            return None if lease is None else lease.relocated()
        except BaseException:
            self.lease = lease  # no descriptor left: not lent
            raise

    def returned(self) -> bool:
        """At the end of the job: return a slot that is not the first one, and say whether so."""
        if self._first is None or self.lease is self._first:
            return False
        if self.lease is not None:
            self.lease.release()
        return True

    def leave(self) -> int:
        """
        At the end of a job in a worker that stays: let go of the slot.

        Returns:
            The descriptor of the lease it came with; -1 if its slot was returned.
        """
        if self._first is None:
            return self._fd
        return self._first.leave() if self.lease is self._first else -1

    def is_just(self, fd: int, place: Optional[tuple[int, int]], bell: int) -> bool:
        """Say whether this is what the next job runs on: the same, and nobody has used it."""
        unused = self._first is None and self._inner_bell < 0 and not self.user
        return unused and self._fd == fd and self._place == place and self._outer_bell == bell

    def successor(self, fd: int, place: Optional[tuple[int, int]], bell: int) -> OwnSlot:
        """
        Return what the next job in this process runs on; after ``leave``.

        It keeps the bell for its children: a reactor that outlives the job may have armed it, and
        would take another one of the same number for armed, too.
        """
        slot = OwnSlot(self.key, fd, place, bell)
        slot._inner_bell, self._inner_bell = self._inner_bell, -1
        while slot.heard():  # left by ringers that were killed
            os.read(slot._inner_bell, 64)
        return slot

    def bell_for_child(self, pool: SlotPool) -> int:
        """Return the bell that a child on ``pool`` is to ring, -1 for none."""
        if not self.attach(pool):
            return -1
        if not self.consumes:
            return self._outer_bell  # its parent could lend nothing
        if self._inner_bell < 0:
            self._inner_bell = new_fifo(1)
        return self._inner_bell

    def bell(self) -> int:
        """Return the descriptor that is readable while the bell rings for this job, -1 for none."""
        return self._inner_bell

    def heard(self) -> bool:
        """Say whether somebody below is blocked without a slot, whom this thread may help."""
        return self._inner_bell >= 0 and waiting_bytes(self._inner_bell) > 0 and self._is_mine()

    def _is_mine(self) -> bool:
        return self.user in (0, threading.get_ident())

    def ring(self) -> bool:
        """Tell whoever waits above that a process is blocked without a slot."""
        if self._outer_bell < 0:
            return False
        try:
            os.write(self._outer_bell, b"!")
        except BlockingIOError:
            return False
        return True

    def hush(self) -> None:
        """Take back what ``ring`` left."""
        try:
            os.read(self._outer_bell, 1)
        except BlockingIOError:
            pass


_own = OwnSlot()
_is_job = False  # or is forked from one


def own_slot() -> OwnSlot:
    """Return what this process runs on."""
    return _own


def run_on(slot: OwnSlot) -> None:
    """In a new worker: state what it runs on."""
    global _own, _is_job  # noqa: PLW0603
    _own = slot
    if not _is_job:  # in others, a child has nothing to forget
        _is_job = True
        _forking.call_in_children(_forget)


def _forget(passed: frozenset[int]) -> None:
    """A process that is merely forked from a job is not that job, and holds no slot."""
    slot = _own
    if slot.key is None:
        return  # it was none before
    run_on(OwnSlot())
    for fd in (slot._outer_bell, slot._inner_bell, slot._fd):
        # A lease in use was closed by its pool; then this number is closed, or not ours.
        attached = fd == slot._fd and slot._first is not None
        if fd >= 0 and fd not in passed and not attached:
            os.close(fd)
