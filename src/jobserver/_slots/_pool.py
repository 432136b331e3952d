# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The tokens of one Jobserver: a pipe that holds those that are free, and berths for those in use.

Guarantees:

* At every instant each token is in the pipe or in exactly one berth: ``splice`` moves it within
  one system call, and SIGKILL acts between system calls. Nothing is counted and nothing minted,
  so nothing needs repair but a dead holder's berth, which any process empties (``sweep``).
* Nothing is in the file system. Pipes are anonymous, and who needs a description of its own
  reopens an inherited descriptor through /proc.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from multiprocessing import reduction
from typing import Any, Optional

from jobserver import _forking

from ._lease import Lease, lock, move_or_false
from ._splice import move_byte, waiting_bytes

_OPEN_FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
_F_SETPIPE_SZ = 1031
_PAGE = os.sysconf("SC_PAGESIZE")
# Up to this many slots there are twice as many berths, so that a random berth is free at the
# second try; beyond it descriptors are the scarcer good.
_AMPLE = 64
_MARGIN = 8


class SlotPool:
    """
    Take, return and wait for tokens; shared by every process that inherited the descriptors.

    Args:
        pool_fd: The pipe of free tokens, open for reading and writing, non-blocking.
        berths: One descriptor for each berth, open for as long as this object is.
    """

    def __init__(self, slots: int, pool_fd: int, berths: list[int]) -> None:
        self.slots = slots
        self.held_fds: set[int] = set()
        self._pool_fd = pool_fd
        self._berths = berths
        self._hint = 0
        self.key = _identity(pool_fd)
        _forking.track(self)

    @classmethod
    def create(cls, slots: int) -> SlotPool:
        """Make a new pool of ``slots`` free tokens."""
        count = 2 * slots + _MARGIN if slots <= _AMPLE else slots + _AMPLE + _MARGIN
        made: list[int] = []
        try:
            # A spliced byte may take a whole page of the ring, so a small ring would refuse tokens.
            made.append(new_fifo(slots + 1))
            made += (new_fifo(1) for _ in range(count))
            _write_all(made[0], b"+" * slots)
        except OSError as error:
            for fd in made:
                os.close(fd)
            raise OSError(
                error.errno,
                f"cannot open the {count + 1} descriptors that {slots} slots need"
                f" ({os.strerror(error.errno or 0)}): raise RLIMIT_NOFILE or use fewer slots",
            ) from error
        return cls(slots, made[0], made[1:])

    def fileno(self) -> int:
        """Return the descriptor that is readable while a token is free."""
        return self._pool_fd

    def free(self) -> int:
        """Return how many tokens are free at this instant."""
        return waiting_bytes(self._pool_fd)

    def try_take(self) -> Optional[Lease]:
        """Take a free token, or return None."""
        if not waiting_bytes(self._pool_fd):
            return None
        count = len(self._berths)
        start = self._hint
        for step in range(count):
            berth = (start + step) % count
            fd = self._open_berth(berth)
            try:
                if lock(fd):
                    # SIGKILL here, before the splice: an empty berth becomes unlocked again.
                    # A byte that is there already is a dead holder's token, now ours.
                    if waiting_bytes(fd) or move_or_false(self._pool_fd, fd):
                        # Takers in other processes would otherwise meet at each berth in turn.
                        self._hint = (berth + 1 + (fd & 1)) % count
                        lease = Lease(self, fd, berth)
                        fd = -1
                        return lease
                    return None
            finally:
                if fd >= 0:
                    os.close(fd)
        return None

    def adopt(self, fd: int, berth: int) -> Lease:
        """Make a lease of a descriptor that somebody handed over."""
        return Lease(self, fd, berth)

    def sweep(self) -> int:
        """Put the tokens of dead holders back; any process may, at any time. Returns how many."""
        return sum(self.sweep_berth(berth) for berth in range(len(self._berths)))

    def sweep_berth(self, berth: int) -> bool:
        """Put the token in ``berth`` back if its holder is dead."""
        if not waiting_bytes(self._berths[berth]):
            return False
        fd = self._open_berth(berth)
        try:
            return lock(fd) and self.unpark(fd)
        finally:
            os.close(fd)

    def unpark(self, fd: int) -> bool:
        """Move the token out of a berth that this process has locked, into the pool."""
        while waiting_bytes(fd):
            try:
                return move_byte(fd, self._pool_fd)
            except BlockingIOError:
                # The ring of a very large pool (over 256 slots, unprivileged) is full of pages of
                # one byte each. Written bytes share a page, at the price of an instant in which
                # SIGKILL loses this token.
                try:
                    token = os.read(fd, 1)
                except BlockingIOError:
                    return False
                _write_all(self._pool_fd, token)
                return True
        return False

    def _open_berth(self, berth: int) -> int:
        """Open a new description, whose lock is nobody else's."""
        return os.open(f"/proc/self/fd/{self._berths[berth]}", _OPEN_FLAGS)

    def after_fork_in_child(self, passed: frozenset[int]) -> None:
        """Close the leases that only the parent holds; its Lease objects become inert here."""
        fds, self.held_fds = self.held_fds, set()
        for fd in fds - passed:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether this process has let go of the pool."""
        return self._pool_fd < 0

    def close(self) -> None:
        """Close this process's descriptors. Leases already taken can no longer be released."""
        fds, self._berths, self._pool_fd = [self._pool_fd, *self._berths], [], -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_berths"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # reduction.DupFd hands the descriptors to the process being started, however it is started.
        dup = reduction.DupFd
        return _rebuild, (self.slots, dup(self._pool_fd), [dup(fd) for fd in self._berths])


def _rebuild(slots: int, pool: Any, berths: list[Any]) -> SlotPool:
    fds = [_cloexec(fd.detach()) for fd in [pool, *berths]]
    return SlotPool(slots, fds[0], fds[1:])


def _cloexec(fd: int) -> int:
    os.set_inheritable(fd, False)
    return fd


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def new_fifo(pages: int) -> int:
    """Open an anonymous FIFO of ``pages`` pages: one descriptor, both ends, non-blocking."""
    reader, writer = os.pipe()
    try:
        fd = os.open(f"/proc/self/fd/{reader}", _OPEN_FLAGS)
    finally:
        os.close(reader)
        os.close(writer)
    # Refused to the unprivileged beyond 256 pages, or over their quota: `unpark` copes.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, pages * _PAGE)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
