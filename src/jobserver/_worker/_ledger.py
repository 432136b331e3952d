# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What a batch of calls has come to: readable also when its worker has died in the middle.

A ledger is an anonymous file that submitter and worker share. It begins with cells of 8 bytes:
BEGUN, set when the worker comes to the calls; LIMIT, the first call that has been taken away from
it; and one for each call, set when what that call has come to stands in the file, to where it ends
there. These records follow the cells, in the order of the calls.

Guarantees:

* A cell is set after its record is written, and never changes. SIGKILL between the two leaves the
  call without a record; it has begun, so it is not made again.
* A call begins only when all before it have their cells. So the first call without one is the
  one that a dead worker was at.
* Each call is made by one worker. A worker locks the places of the calls that it is about to make,
  and a submitter of those that it takes away, the last ones. The owner of a POSIX lock is a
  process, so the kernel lets one of the two have a place. Locks end with their owner; LIMIT is set
  while the lock is held, and stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple, Optional, Union

from jobserver import _forking
from jobserver._wire import LENGTH, TYPES, WHAT, Buffer

CELL = 8
BEGUN = 0
LIMIT = 1
FIRST = 2  # the cell of the first call
#: Set in a cell, next to the end (which is doubled), whose record is not just a plain pickle.
FRAMED = 1

_HEAD = struct.Struct("<BxxxiQ")  # kind, exit code, number of segments
_ROOM = 64  # bytes of the file for each record, to begin with
_PAGE = 4096
#: What is longer stays in the file until it is asked for.
_HELD = 1 << 20
_READ = 1 << 30


class Record(NamedTuple):
    """A record that is not just the pickle of a result: the parts of an answer."""

    kind: int
    exitcode: int
    segments: list[Union[bytes, bytearray]]


def frame(kind: int, exitcode: int, segments: Sequence[Buffer]) -> list[Buffer]:
    """Return the pieces of a record that ``Ledger.records`` will return as a ``Record``."""
    # What is bytes or a bytearray must stay so; other buffers may be of any type.
    entries = [memoryview(piece).nbytes | TYPES.index(type(piece)) << WHAT for piece in segments]
    lengths = struct.pack(f"<{len(segments)}Q", *entries)
    return [_HEAD.pack(kind, exitcode, len(segments)) + lengths, *segments]


class Ledger:
    """
    One ledger, for ``count`` calls. In the submitter, which closes it.

    Raises:
        OSError: No descriptor or no memory is left for it.
    """

    __slots__ = ("_closing", "_epoch", "_starting", "count", "fd")

    def __init__(self, count: int) -> None:
        self.count = count
        self._epoch = _forking.epoch()
        self._starting = self._closing = False
        with _forking.books_lock():
            self.fd = _forking.lifted(os.memfd_create("jobserver-batch"))
            _forking.owned.add(self.fd)
        try:
            size = CELL * (FIRST + count) + _ROOM * count
            os.ftruncate(self.fd, size + -size % _PAGE)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Meanwhile the worker is started; if it is forked, it is to keep the descriptor."""
        with _forking.books_lock():
            self._starting = True
            _forking.owned.discard(self.fd)
        try:
            yield
        finally:
            with _forking.books_lock():
                self._starting = False
                if self.fd >= 0:
                    _forking.owned.add(self.fd)
                if self._closing:
                    self.close()

    def close(self) -> None:
        """Let go of it; as soon as the worker has its own hold, if it is just being started."""
        if self._epoch != _forking.epoch():
            return  # in a process forked from the submitter there is nothing to let go of
        with _forking.books_lock():
            self._closing = True
            if self.fd >= 0 and not self._starting:
                fd, self.fd = self.fd, -1
                _forking.close(fd)

    def begun(self) -> bool:
        """Say whether the worker has come to the calls."""
        return os.pread(self.fd, CELL, 0) != bytes(CELL)

    def ends(self) -> memoryview:
        """Return the cells of the calls, as unsigned numbers; 0 where there is no record yet."""
        return memoryview(os.pread(self.fd, CELL * self.count, CELL * FIRST)).cast("Q")

    def lock(self, start: int, stop: int) -> bool:
        """Take calls for this process; False if another one has any of them."""
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - start, start)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def take_away(self, start: int, stop: int) -> bool:
        """Take the last calls away from the worker; False if it has, or may have, begun them."""
        if not self.lock(start, stop):
            return False
        # A worker that has ended holds no lock any more: what it was at has no record, either.
        if os.pread(self.fd, CELL, CELL * (FIRST + start - 1)) != bytes(CELL):
            fcntl.lockf(self.fd, fcntl.LOCK_UN, stop - start, start)
            return False
        os.pwrite(self.fd, start.to_bytes(CELL, sys.byteorder), CELL * LIMIT)
        return True

    def records(self, ends: Sequence[int], start: int, stop: int) -> Records:
        """Return what calls have come to, all of which have records."""
        at = ends[start - 1] >> 1 if start else CELL * (FIRST + self.count)
        last = ends[stop - 1] >> 1 if start < stop else at
        data = os.pread(self.fd, last - at, at) if last - at <= _HELD else None
        return Records(self.fd, data, at, ends[start:stop])

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            raise TypeError("a ledger is only for the worker that it was made for")
        return _receive, (reduction.DupFd(self.fd), self.count)


def _receive(passed: Any, count: int) -> Ledger:
    ledger = Ledger.__new__(Ledger)
    ledger.fd = passed.detach()
    ledger.count = count
    ledger._epoch = -1
    return ledger


class Records:
    """
    The records of successive calls, each to be asked for in its turn.

    Args:
        fd: The file that they are in.
        data: What is in the file from ``at`` on; None if that is a lot, and read piece by piece.
        at: Where the first of them begins in the file.
        ends: Their cells.
    """

    __slots__ = ("_at", "_ends", "_fd", "data")

    def __init__(self, fd: int, data: Optional[bytes], at: int, ends: Sequence[int]) -> None:
        self._fd = fd
        self.data = data
        self._at = at
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Any]:
        """Yield a pickle (``bytes``), None for that of None, or a ``Record``."""
        data, base = self.data, self._at
        at = base
        for cell in self._ends:
            end = cell >> 1
            if cell & FRAMED:
                yield self._unframe(at)
            elif at == end:
                yield None
            elif data is None:
                yield self._part(at, end)
            else:
                yield data[at - base : end - base]
            at = end

    def _part(self, start: int, stop: int) -> bytes:
        if self.data is not None:
            return self.data[start - self._at : stop - self._at]
        if stop - start <= _READ:
            return os.pread(self._fd, stop - start, start)
        return bytes(self._copy(start, stop))

    def _copy(self, start: int, stop: int) -> bytearray:
        if self.data is not None:
            return bytearray(self.data[start - self._at : stop - self._at])
        data = bytearray(stop - start)
        view = memoryview(data)
        while view:
            count = os.preadv(self._fd, [view[:_READ]], stop - len(view))
            if not count:
                raise EOFError("a ledger is shorter than its cells say")
            view = view[count:]
        return data

    def _unframe(self, at: int) -> Record:
        kind, exitcode, count = _HEAD.unpack(self._copy(at, at + _HEAD.size))
        at += _HEAD.size
        entries = struct.unpack(f"<{count}Q", self._copy(at, at + CELL * count))
        at += CELL * count
        segments: list[Union[bytes, bytearray]] = []
        for entry in entries:
            end = at + (entry & LENGTH)
            is_bytes = TYPES[entry >> WHAT] is bytes
            segments.append(self._part(at, end) if is_bytes else self._copy(at, end))
            at = end
        return Record(kind, exitcode, segments)
