# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A ledger as the worker writes it; see ``_ledger`` for what it guarantees."""

from __future__ import annotations

import errno
import io
import mmap
import os
import pickle
from collections.abc import Sequence
from typing import Any

from jobserver._dump import Buffer, _Pickler

from ._ledger import BEGUN, CELL, FIRST, FRAMED, LIMIT, Ledger

# A buffer from this size on is not to be copied into a pickle, if that can be known before.
_LARGE = 1 << 14
_SIZED = frozenset((bytes, bytearray))


class Small:
    """Pickles what has no large buffers: one pickler for many values, which forgets each."""

    def __init__(self) -> None:
        self._stream = io.BytesIO()
        self._pickler = _Pickler(self._stream, 5, buffer_callback=_refuse_large)

    def dumps(self, value: Any) -> bytes:
        """Return a pickle of ``value``; raises anything, for a large one too."""
        if type(value) in _SIZED and len(value) >= _LARGE:
            raise BufferError("too large for a pickle")
        stream = self._stream
        stream.seek(0)
        stream.truncate()
        try:
            self._pickler.dump(value)
        finally:
            self._pickler.clear_memo()  # which refers to all that was pickled
        return stream.getvalue()


def _refuse_large(buffer: pickle.PickleBuffer) -> bool:
    if memoryview(buffer).nbytes >= _LARGE:
        raise BufferError("too large for a pickle")
    return True


class Log:
    """
    The records of one batch, as they are made.

    Mapped, as a write of some bytes to memory costs a tenth of a system call, and survives the
    process just as well.
    """

    __slots__ = ("_file", "_ledger", "at", "cells", "memory", "small")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._file = os.fstat(ledger.fd).st_ino
        self.memory = mmap.mmap(ledger.fd, 0)
        self.cells: Any = memoryview(self.memory).cast("Q")
        self.small = Small()
        self.at = CELL * (FIRST + ledger.count)
        self.cells[BEGUN] = 1

    def limit(self) -> int:
        """Return the number of the first call that has been taken away; the count for none."""
        return self.cells[LIMIT] or self._ledger.count

    def lock(self, start: int, stop: int) -> bool:
        """Take calls for this process; False if some are taken, or nobody can tell any more."""
        try:
            return self._is_open() and self._ledger.lock(start, stop)
        except OSError:  # no memory for a lock
            return False

    def _is_open(self) -> bool:
        # A call may have closed the file, and opened another one under its number.
        try:
            return os.fstat(self._ledger.fd).st_ino == self._file
        except OSError:
            return False

    def add(self, index: int, pieces: Sequence[Buffer]) -> None:
        """Write the framed record of a call."""
        at = self.at
        for piece in pieces:
            view = memoryview(piece).cast("B")
            end = at + view.nbytes
            if end > len(self.memory):
                self._grow(end)
            self.memory[at:end] = view
            at = end
        self.at = at
        self.cells[FIRST + index] = at << 1 | FRAMED

    def _grow(self, least: int) -> None:
        if not self._is_open():
            raise OSError(errno.EBADF, "a call has closed the file that results are written to")
        size = max(2 * len(self.memory), least + -least % mmap.PAGESIZE)
        os.ftruncate(self._ledger.fd, size)
        self._unmap()
        self.memory = mmap.mmap(self._ledger.fd, size)
        self.cells = memoryview(self.memory).cast("Q")

    def _unmap(self) -> None:
        self.cells.release()
        self.memory.close()

    def close(self) -> None:
        """Let go of the file, which this process may outlive; the records stay."""
        self._unmap()
        if self._is_open():
            os.close(self._ledger.fd)
