# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
One slot in use.

Guarantees:

* The token of a lease lies in a small FIFO of its own (a *berth*), whose lock belongs to the open
  file description that the lease holds. The description is shared with the worker that runs on
  the slot, so the kernel drops the lock exactly when everybody who shares it is gone.
* A token in an unlocked berth is a dead holder's. Any process may put it back into the pool.
* A lease is in one hand at a time: to lend is to give the object away.

A plain lease has no berth: its token is in the memory of whoever took it. It is what there is when
berths run out, and does all that other leases do but survive a SIGKILL of its holder.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Any, Optional

from jobserver import _forking

from ._section import lock, write_all
from ._splice import waiting_bytes

if TYPE_CHECKING:
    from ._pool import SlotPool
    from ._section import Section

_books = _forking.books_lock()


class Lease:
    """A token taken out of a pool; made by ``SlotPool.try_take`` and ``SlotPool.adopt`` only."""

    __slots__ = ("_epoch", "_fd", "_token", "berth", "pool", "section", "since", "worker")

    def __init__(
        self, pool: SlotPool, fd: int, berth: int, section: Section, token: bytes = b""
    ) -> None:
        self.pool: SlotPool = pool
        self.section: Section = section
        self.berth: int = berth
        # Who is to run on it: a worker that has run other jobs, if any (a Flight).
        self.worker: Any = None
        self.since: float = 0.0  # when such a worker's token was last taken from the pool
        self._fd = fd
        self._token = token
        self._epoch = _forking._epoch
        if fd >= 0:
            pool.held_fds.add(fd)

    def fileno(self) -> int:
        """Return the descriptor that shares the lock, to be handed to the worker; -1 if plain."""
        return self._fd

    @property
    def place(self) -> tuple[int, int]:
        """The numbers of its section and of its berth, by which others know it."""
        return self.section.number, self.berth

    def release(self) -> None:
        """Put the token back. The lock is dropped for everybody who shares the description."""
        token, self._token = self._token, b""
        if token and self._epoch == _forking._epoch:
            write_all(self.section.pipe, token)
        with _books:
            fd = self._let_go()
            if fd < 0:
                return
            try:
                # SIGKILL before the move: the token lies in a berth that becomes unlocked, to be
                # swept. SIGKILL after it: an empty berth becomes unlocked.
                self.section.unpark(fd)
                fcntl.flock(fd, fcntl.LOCK_UN)
            finally:
                os.close(fd)

    @property
    def seated(self) -> bool:
        """Whether its berth may be kept, locked, when the token has gone back."""
        return self._fd >= 0 and self.berth < self.section.seats

    def drain(self) -> bool:
        """
        Put the token back, and keep the berth locked for the next one.

        SIGKILL before the move: whoever shares the lock holds the slot on, and then it is swept.
        SIGKILL after it: an empty berth becomes unlocked.
        """
        return self.section.drain(self._fd)

    def refill(self) -> bool:
        """Take a free token into the berth that was kept; False if there is none."""
        return self.section.refill(self._fd)

    def abandon(self) -> None:
        """Let go without moving the token: whoever else shares the lock holds the slot on."""
        self._token = b""
        with _books:
            fd = self._let_go()
            if fd >= 0:
                os.close(fd)

    def relocated(self) -> Optional[Lease]:
        """
        Return the lease to lend: the token in a berth of its own, this object spent.

        A job shares the lock of the berth that it came with with its submitter. Whom it lends to
        must not share that lock: else nobody could tell, when the borrower has died, that the
        token is free. Without a free berth the token stays where it is, under a new lock; None
        when somebody has swept it into the pool between the two locks.
        """
        if self._fd < 0:
            return self
        with _books:
            moved = self.section.relocate(self._fd) or self.section.relock(self._fd, self.berth)
            lease = None
            if moved is not None:
                fd, berth = moved
                lease = Lease(self.pool, fd, berth, self.section)
            os.close(self._let_go())
            return lease

    def leave(self) -> int:
        """Give the descriptor away, with lock and token; the object is spent."""
        self._token = b""
        return self._let_go()

    def reclaim(self) -> bool:
        """
        After the death of the worker: say whether the token is here and nobody else's.

        The worker may have put it elsewhere, and somebody else's may lie in the berth.
        """
        return self._fd < 0 or (lock(self._fd) and waiting_bytes(self._fd) > 0)

    def _let_go(self) -> int:
        """Return the descriptor if it is still this object's to close, else -1."""
        fd, self._fd = self._fd, -1
        # After a fork the pool has closed what only the parent holds; the number may be reused.
        if fd < 0 or self._epoch != _forking._epoch:
            return -1
        self.pool.held_fds.discard(fd)
        return fd

    def __del__(self) -> None:
        # Only an exception at an unlucky instant (Ctrl-C between two bytecodes) leads here with a
        # token still in hand; it must not be lost.
        if self._fd < 0 and not self._token:
            return
        if self.pool.closed:
            self.abandon()
        else:
            self.release()
