# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Part of a pool: a pipe of free tokens, and berths for those of them that are in use.

Guarantees:

* At every instant each token is in the pipe or in exactly one berth: ``splice`` moves it within
  one system call, and SIGKILL acts between system calls. Nothing is counted and nothing minted,
  so nothing needs repair but a dead holder's berth, which any process may empty (``sweep``).
* A token that was taken from this pipe goes back into this pipe, as the same byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Optional

from jobserver import _forking
from jobserver._forking import lifted

from ._splice import move_byte, waiting_bytes

OPEN_FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
F_SETPIPE_SZ = 1031
_F_GETPIPE_SZ = 1032
PAGE = os.sysconf("SC_PAGESIZE")
# How often to look for a berth that is neither in use nor being tried by somebody else: for longer
# than a crowd of waiters takes to see that one token is one, and not for ever, as a process may
# have been stopped with its hand on one.
PATIENCE = 1000

# This process's /proc/self/fd, and of which process it is: that of the parent stays the parent's.
# To open a berth from there takes a fifth less time than by its whole path.
_folder = _folder_of = -1
_folder_file: Optional[tuple[int, int]] = None


class Section:
    """
    One pipe and its berths.

    Args:
        pipe: The pipe of free tokens, open for reading and writing, non-blocking.
        berths: One descriptor for each berth, open for as long as this object is.
        seats: So many of the first berths may stay locked while there is no token in them, each
            by a worker that waits for its next job. The rest is enough for all tokens.
    """

    def __init__(self, pipe: int, berths: list[int], seats: int) -> None:
        self.pipe = pipe
        self.berths = berths
        self._names = [str(berth) for berth in berths]
        self.seats = seats
        self._hint = seats
        self.number = 0  # among the sections of its pool

    def take(self, *, seat: bool = False) -> Optional[tuple[int, int]]:
        """
        Take a free token into a berth, into a seat if there is one and ``seat`` asks for it.

        Returns:
            The berth's descriptor and number.
        """
        if not waiting_bytes(self.pipe):
            return None
        return self._move_in(self.pipe, 0 if seat else self._hint)

    def reserve(self) -> Optional[tuple[int, int]]:
        """Lock a seat, without a token; returns the berth's descriptor and number."""
        for berth in range(self.seats):
            fd = self._open(berth)
            try:
                if lock(fd):
                    self.unpark(fd)  # a dead holder's token
                    taken, fd = fd, -1
                    return taken, berth
            finally:
                if fd >= 0:
                    os.close(fd)
        return None

    def drain(self, fd: int) -> bool:
        """Put the token in a locked berth back, and keep the lock; False if there was none."""
        return self.unpark(fd)

    def refill(self, fd: int) -> bool:
        """Take a free token into a locked berth; False if there is none."""
        return _moved(self.pipe, fd)

    def relocate(self, parked: int) -> Optional[tuple[int, int]]:
        """
        Move a token from the berth behind ``parked`` to another one, and unlock the first.

        Whoever shares the first berth's lock so has no part in the second's.
        """
        for _patience in range(PATIENCE):
            moved = self._move_in(parked, self._hint)
            if moved is not None:
                # SIGKILL here: a locked berth without a token, which its other holder lets go.
                fcntl.flock(parked, fcntl.LOCK_UN)
                return moved
            if self.full():
                break
            os.sched_yield()
        return None

    def relock(self, parked: int, berth: int) -> Optional[tuple[int, int]]:
        """
        Lock the berth behind ``parked`` anew; whoever shares the old lock has no part in the new.

        None when its token is gone: for an instant it looks like a dead holder's.
        """
        fd = self._open(berth)
        fcntl.flock(parked, fcntl.LOCK_UN)
        # SIGKILL here: the token is in an unlocked berth, to be swept.
        if lock(fd) and waiting_bytes(fd):
            return fd, berth
        os.close(fd)
        return None

    def _move_in(self, source: int, start: int) -> Optional[tuple[int, int]]:
        """Move a token from ``source`` into a free berth; returns its descriptor and number."""
        count = len(self.berths)
        for step in range(count):
            berth = (start + step) % count
            fd = self._open(berth)
            try:
                if lock(fd):
                    # SIGKILL here, before the splice: an empty berth becomes unlocked again.
                    # A byte that is there already is a dead holder's token, and fills the ring.
                    if not _moved(source, fd):
                        if not waiting_bytes(fd):
                            return None
                        if source != self.pipe:
                            fcntl.flock(fd, fcntl.LOCK_UN)
                            continue
                    # Takers in other processes would otherwise meet at each berth in turn.
                    after = berth + 1 + (fd & 1)
                    self._hint = after if self.seats <= after < count else self.seats
                    taken, fd = fd, -1
                    return taken, berth
            finally:
                if fd >= 0:
                    os.close(fd)
        return None

    def full(self) -> bool:
        """Say whether a token lies in every berth."""
        return all(waiting_bytes(berth) for berth in self.berths)

    def sweep(self) -> int:
        """Put the tokens of dead holders back; returns how many."""
        return sum(self.sweep_berth(berth) for berth in range(len(self.berths)))

    def sweep_berth(self, berth: int) -> bool:
        """Put the token in ``berth`` back if its holder is dead."""
        if not waiting_bytes(self.berths[berth]):
            return False
        fd = self._open(berth)
        try:
            return lock(fd) and self.unpark(fd)
        finally:
            os.close(fd)

    def unpark(self, fd: int) -> bool:
        """Move the token out of a berth that this process has locked, into the pipe."""
        try:
            return move_byte(fd, self.pipe)
        except BlockingIOError:
            if not waiting_bytes(fd):
                return False
        # Each spliced byte takes a page of the pipe's ring, and the ring is full: it could not be
        # made as large as it should be. Written together, all bytes share a page. SIGKILL in this
        # instant loses them; there is no other way to make room.
        _compact(self.pipe)
        with contextlib.suppress(BlockingIOError):
            return move_byte(fd, self.pipe)
        return False

    def _open(self, berth: int) -> int:
        """Open a new description, whose lock is nobody else's."""
        folder = _folder if _folder_of == _forking._epoch else _open_folder()
        try:
            fd = os.open(self._names[berth], OPEN_FLAGS, dir_fd=folder)
        except OSError:
            fd = os.open(self._names[berth], OPEN_FLAGS, dir_fd=_open_folder())
        return fd if fd > 2 else lifted(fd)


def _open_folder() -> int:
    global _folder, _folder_of, _folder_file  # noqa: PLW0603
    with _forking.books_lock():
        if _folder_of != _forking._epoch or _file_of(_folder) != _folder_file:
            # A program that has closed all descriptors it could find has left it as it was before.
            if _folder_of == _forking._epoch:
                _forking.owned.discard(_folder)
            _folder = lifted(os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            _forking.owned.add(_folder)
            _folder_of, _folder_file = _forking._epoch, _file_of(_folder)
        return _folder


def _file_of(fd: int) -> Optional[tuple[int, int]]:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def lock(fd: int) -> bool:
    """Try to lock the berth behind ``fd``; False when somebody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _moved(source: int, target: int) -> bool:
    try:
        return move_byte(source, target)
    except BlockingIOError:
        return False


def _compact(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):
        tokens = os.read(pipe, PAGE)
        write_all(pipe, tokens)


def new_fifo(pages: int) -> int:
    """Open an anonymous FIFO of ``pages`` pages: one descriptor, both ends, non-blocking."""
    reader, writer = os.pipe()
    try:
        fd = lifted(os.open(f"/proc/self/fd/{reader}", OPEN_FLAGS))
    finally:
        os.close(reader)
        os.close(writer)
    # Refused to the unprivileged beyond 256 pages, or over their quota: see `ring_of`.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, F_SETPIPE_SZ, pages * PAGE)
    return fd


def ring_of(fd: int) -> int:
    """Return of how many pages the ring of a pipe is: so many spliced bytes have room."""
    return fcntl.fcntl(fd, _F_GETPIPE_SZ) // PAGE


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data``."""
    while data:
        data = data[os.write(fd, data) :]
