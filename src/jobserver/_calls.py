# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The queue from which the workers of an executor, or of a map, take short calls by themselves.

A hand-over for each call would cost as much as hundreds of them. So while calls wait in the
backlog they are put, in their order, into a queue that all workers share (see ``_worker._queue``);
a slot is given to a *drain*, a job that makes calls from there for some milliseconds.

Guarantees:

* A call in the queue is pending until a worker claims it: ``recall`` gets it back.
* Each call is made once: it is in the backlog, or in the queue, or claimed by one drain; and what a
  drain that failed had claimed but not begun (``settle_lost``) goes back into the backlog.
* No lock is taken while this one is held, no code of the user runs under it, and what the garbage
  collector calls from within does nothing.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from . import _forking
from ._slots._section import PAGE, new_fifo, ring_of
from ._slots._splice import waiting_bytes
from ._worker._ledger import BEGUN, CELL, FIRST, Ledger
from ._worker._queue import CLAIM, MOST, Queue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._backlog import Backlog, Call
    from ._pledge import Pledge

_PAGES = 16
_BLOCK = 1 << 16
# When to look what a drain has done that has not ended as soon as most do, in seconds.
_LOOK = 0.01
_SELDOM = 0.1


class _Out(NamedTuple):
    """A call that was put into the queue and has not ended."""

    promise: Pledge
    call: Call
    block: int  # where its pickle is


class Drain:
    """A job that makes calls from the queue, and how far it is known to be."""

    __slots__ = ("_memory", "_overdue", "born", "cells", "done", "ledger", "look_at", "seen")

    def __init__(self) -> None:
        self.ledger = Ledger(2 * MOST)
        try:
            # Mapped, as each system call may cost the thread its turn in the interpreter.
            self._memory = mmap.mmap(self.ledger.fd, CELL * (FIRST + 2 * MOST), prot=mmap.PROT_READ)
        except BaseException:  # it has a descriptor of its own, for which there was none left
            self.ledger.close()
            raise
        self.cells: Any = memoryview(self._memory).cast("Q")
        self.born = 0  # the number of its worker, if that is forked
        self.done = 0  # so many of its calls have been resolved
        self.seen = 0  # so many it had begun at the last look
        now = time.monotonic()
        self.look_at = now + _LOOK
        self._overdue = now + _SELDOM

    def progress(self) -> tuple[memoryview, list[int]]:
        """Return the ends of results, as far as there are some, and the numbers of calls begun."""
        cells = self.cells
        begun = self.seen
        while begun < MOST and cells[FIRST + MOST + begun]:
            begun += 1
        made = begun if begun and cells[FIRST + begun - 1] else max(begun - 1, 0)
        start = FIRST + MOST
        return cells[FIRST : FIRST + made], cells[start : start + begun].tolist()

    def is_fresh(self) -> bool:
        """Say whether it has not begun any call."""
        return not self.cells[FIRST + MOST]

    def is_coming(self) -> bool:
        """Say whether it is about to begin; not if its worker is stopped, say."""
        return self.is_fresh() and time.monotonic() < self._overdue

    def may_claim(self) -> bool:
        """Say whether it may have claimed a call that it has not noted yet."""
        ends, numbers = self.progress()
        return len(ends) == len(numbers) and self.cells[BEGUN] != 0

    def close(self) -> None:
        """Let go of the ledger."""
        del self.cells, self._memory
        self.ledger.close()

    def looked(self, begun: int) -> None:
        """Take note of how far it is, and choose when to look again."""
        now = time.monotonic()
        if begun and begun == self.seen:
            # At a call that has taken long enough by now to be its last one.
            self.look_at = float("inf")
        else:
            self.look_at = now + (_LOOK if begun else _SELDOM)
        self.seen = begun


class Calls:
    """
    The queue, in its submitter.

    Args:
        backlog: Where calls come from, and go back to; its lock guards this, too.

    Raises:
        OSError: No descriptor is left for it.
    """

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._epoch = _forking.epoch()
        self._open = False
        self.drains: dict[Any, Drain] = {}
        with _forking.books_lock():
            claims = new_fifo(_PAGES)
            try:
                space = os.memfd_create("jobserver-calls")
            except BaseException:
                os.close(claims)
                raise
            _forking.owned.update((claims, space))
        self.queue = Queue(claims, space)
        self._open = True
        self.room = ring_of(claims) * PAGE // CLAIM.size
        #: See ``youth`` in ``_births``; of all that is in the queue.
        self.youth: float = -1
        self.surroundings: Any = None
        self._numbers = count(1)
        self._out: dict[int, _Out] = {}
        self._used: dict[int, int] = {}  # how many calls are in each block of the space
        self._free: list[int] = []
        self._lost = False
        self._busy = False

    def __len__(self) -> int:
        """Return how many calls have not ended."""
        return len(self._out)

    def waiting(self) -> int:
        """Return how many calls have not been claimed."""
        if not self.drains and not self._lost:
            return len(self._out)  # there is nobody who could have claimed one
        return waiting_bytes(self.queue.claims) // CLAIM.size if self._out else 0

    def wants_drain(self) -> bool:
        """Say whether one more drain would find something to do."""
        waiting = self.waiting()
        coming = 0
        if waiting:
            for drain in self.drains.values():
                coming += drain.is_coming()
        return waiting > coming

    @contextmanager
    def _held(self) -> Iterator[None]:
        with self._backlog.lock:
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def add(self, calls: Sequence[tuple[Pledge, Call, bytes]]) -> int:
        """Put calls, the first ones of the backlog, into the queue; returns how many have come."""
        with self._held():
            there = [each for each in calls if each[0] in self._backlog]
            block, at, data = -1, 0, bytearray()
            claims = bytearray()
            placed: list[tuple[int, _Out]] = []
            for promise, call, pickled in there:
                if block < 0 or at + len(pickled) > _BLOCK:
                    self._write(block, data)
                    block, at, data = self._block(placed, block), 0, bytearray()
                number = next(self._numbers)
                claims += CLAIM.pack(number, block * _BLOCK + at, len(pickled))
                data += pickled
                at += len(pickled)
                placed.append((number, _Out(promise, call, block)))
            self._write(block, data)
            for number, out in placed:
                self._out[number] = out
                self._used[out.block] = self._used.get(out.block, 0) + 1
                out.promise.number = number
            self._backlog.cut_off([out.promise for _, out in placed])
            written = 0
            try:
                written = os.write(self.queue.claims, claims) // CLAIM.size if claims else 0
            except BlockingIOError:
                pass
            finally:
                self._back([number for number, _ in placed[written:]])
            return written

    def _block(self, placed: list[tuple[int, _Out]], last: int) -> int:
        """Return a block of the space with nothing in it."""
        while self._free:
            return self._free.pop()
        return max([last, *self._used, *(out.block for _, out in placed)], default=-1) + 1

    def _write(self, block: int, data: bytearray) -> None:
        if data:
            os.pwrite(self.queue.space, data, block * _BLOCK)

    def _drop(self, number: int) -> _Out:
        out = self._out.pop(number)
        left = self._used[out.block] - 1
        if left:
            self._used[out.block] = left
        else:
            del self._used[out.block]
            self._free.append(out.block)
        return out

    def _back(self, numbers: Iterable[int]) -> None:
        """Put calls, in their order, back to the front of the backlog."""
        outs = [self._drop(number) for number in sorted(numbers)]
        self._backlog.put_back([(out.promise, out.call) for out in outs])
        for out in outs:
            out.promise.number = 0

    def recall(self) -> bool:
        """Put all that has not been claimed back into the backlog; False if that cannot be now."""
        with self._backlog.lock:
            if self._busy:
                return False
            with self._held():
                self._recall()
            return True

    def _recall(self) -> None:
        try:
            data = os.read(self.queue.claims, self.room * CLAIM.size)
        except BlockingIOError:
            return
        self._back([number for number, _, _ in CLAIM.iter_unpack(data)])

    def begun(self) -> list[Pledge]:
        """Return the calls that drains are at, or have made."""
        found: list[Pledge] = []
        with self._backlog.lock:
            if not self._busy:
                for drain in list(self.drains.values()):
                    found += self._promises(drain.progress()[1][drain.done :])
        return found

    def _promises(self, numbers: Iterable[int]) -> list[Pledge]:
        return [self._out[number].promise for number in numbers if number in self._out]

    def results(self, drain: Drain, *, ended: bool) -> list[tuple[Pledge, Any]]:
        """
        Return the calls that a drain has made, less those that have been returned before, each with
        the pickle of its result (None for that of None). They are the caller's to resolve.

        Args:
            drain: Which.
            ended: It has ended. Otherwise the last result is left, as its slot is not free yet, and
                as this process may see what is written in another order than it was.
        """
        ends, numbers = drain.progress()
        made = len(ends) if ended else min(len(ends), max(len(numbers) - 1, 0))
        start, drain.done = drain.done, made
        if not ended:
            # What was written before another claim is seen by who comes to the FIFO after that.
            waiting_bytes(self.queue.claims)
            drain.looked(len(numbers))
        if start >= made:
            return []
        records = list(drain.ledger.records(ends, start, made))
        with self._held():
            promises = [self._drop(number).promise for number in numbers[start:made]]
        return list(zip(promises, records))

    def ended(self, job: Any, *, well: bool) -> Optional[Pledge]:
        """
        Forget a drain that has ended, whose results have been taken.

        Args:
            job: Its future.
            well: It has ended by itself, so it has lost nothing.

        Returns:
            The call that it was at, if there is one; it is the caller's to resolve.
        """
        with self._held():
            drain = self.drains.pop(job)
            rest = drain.progress()[1][drain.done :]
            last = self._drop(rest[0]).promise if rest else None
        drain.close()
        self._lost = self._lost or not (well or rest)
        return last

    def settle_lost(self) -> None:
        """Have calls made that were claimed by a drain which then failed before it began them."""
        if not self._lost:
            return
        with self._held():
            # First of all: what is written before a claim is seen by who comes to the FIFO later.
            self._recall()
            claimed: set[int] = set()
            for drain in self.drains.values():
                if drain.may_claim():
                    return
                claimed.update(drain.progress()[1])
            self._back([number for number in self._out if number not in claimed])
            self._lost = False

    def next_look(self) -> Optional[float]:
        """Return when to look at the drains; None for not at all."""
        if self._lost:
            return time.monotonic() + _LOOK / 2
        return min((drain.look_at for drain in self.drains.values()), default=None)

    def abandon(self) -> None:
        """Let go of the drains, which have their own hold of their ledgers."""
        while self._open and self.drains:
            self.drains.popitem()[1].close()

    def close(self) -> None:
        """Let go of the files."""
        if self._open and self._epoch == _forking.epoch():
            self._open = False
            self._out.clear()
            for fd in (self.queue.claims, self.queue.space):
                _forking.close(fd)

    def __del__(self) -> None:
        # Only an exception at an unlucky instant (Ctrl-C in a `finally`) leads here with them open.
        # Those who let go of this defer signals: what a handler raises in here would be lost.
        self.abandon()
        self.close()
