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
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from jobserver._forking import epoch

from ._splice import move_byte

if TYPE_CHECKING:
    from ._pool import SlotPool


class Lease:
    """A token taken out of a pool; made by ``SlotPool.try_take`` and ``SlotPool.adopt`` only."""

    __slots__ = ("_epoch", "_fd", "berth", "pool")

    def __init__(self, pool: SlotPool, fd: int, berth: int) -> None:
        self.pool = pool
        self._fd = fd
        self._epoch = epoch()
        self.berth = berth
        pool.held_fds.add(fd)

    def fileno(self) -> int:
        """Return the descriptor that shares the lock, to be handed to the worker."""
        return self._fd

    def release(self) -> None:
        """Put the token back. The lock is dropped for everybody who shares the description."""
        fd = self._let_go()
        if fd < 0:
            return
        try:
            # SIGKILL before the move: the token lies in a berth that becomes unlocked, to be swept.
            # SIGKILL after it: an empty berth becomes unlocked.
            self.pool.unpark(fd)
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def abandon(self) -> None:
        """Let go without moving the token: whoever else shares the lock holds the slot on."""
        fd = self._let_go()
        if fd >= 0:
            os.close(fd)

    def _let_go(self) -> int:
        """Return the descriptor if it is still this object's to close, else -1."""
        fd, self._fd = self._fd, -1
        # After a fork the pool has closed what only the parent holds; the number may be reused.
        if fd < 0 or self._epoch != epoch():
            return -1
        self.pool.held_fds.discard(fd)
        return fd

    def __del__(self) -> None:
        # Only an exception at an unlucky instant (Ctrl-C between two bytecodes) leads here with a
        # descriptor still open; the token must not be lost with it.
        if self._fd < 0:
            return
        if self.pool.closed:
            self.abandon()
        else:
            self.release()


def lock(fd: int) -> bool:
    """Try to lock the berth behind ``fd``; False when somebody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def move_or_false(source: int, target: int) -> bool:
    """Move one byte; False when there is none to move, or no room."""
    try:
        return move_byte(source, target)
    except BlockingIOError:
        return False
