# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Successive calls of a map that one worker gets, and what they have come to."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Optional, Protocol

from ._outcome import Outcome
from ._wire import RESULT, Frame
from ._worker._ledger import Ledger, Record, Records

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# How often a batch that runs is looked at for results, in seconds.
LOOK = 0.05


class Ending(Protocol):
    """How a worker has ended: an ``Outcome``, or what stands for one."""

    died: bool

    def get(self) -> Any:
        """Return what it has returned, or raise what it has raised."""
        ...


class Batch:
    """Successive calls for one worker, and what they have come to."""

    __slots__ = (
        "_looked",
        "_read",
        "_records",
        "_seen",
        "alone",
        "argses",
        "begun",
        "future",
        "kwargses",
        "last",
        "ledger",
        "running",
        "stop",
        "taken",
    )

    def __init__(self, argses: list[Args], kwargses: Optional[list[Kwargs]]) -> None:
        self.argses = argses
        self.kwargses = kwargses
        self.stop = len(argses)  # the calls from here on have become another batch's
        self.alone = False  # each call is to get a worker of its own
        self.begun = 0.0  # when it was submitted
        self.running = False
        self.future: Any = None  # of its worker
        self.ledger: Optional[Ledger] = None
        self.last: Optional[Ending] = None  # of the last call, if that has no record
        self.taken = 0  # so many results have been yielded, or are about to be
        self._records: Optional[Iterable[Any]] = None  # the others, once it has ended
        self._seen = self._read = 0
        self._looked = 0.0

    @property
    def ended(self) -> bool:
        """Whether it is known what all its calls have come to."""
        return self._records is not None

    def split(self, start: int) -> Batch:
        """Cut off the calls from ``start`` on."""
        kwargses = None if self.kwargses is None else self.kwargses[start : self.stop]
        rest = Batch(self.argses[start : self.stop], kwargses)
        rest.alone = self.alone
        self.stop = start
        self.argses = self.argses[:start]
        return rest

    def singles(self) -> Optional[list[Any]]:
        """Return the argument of each call; None unless each has one, and no other."""
        try:
            return [arg for (arg,) in self.argses] if self.kwargses is None else None
        except ValueError:
            return None

    def made(self, ends: Sequence[int]) -> int:
        """Return how many of its calls have a record."""
        count = self._seen
        while count < self.stop and ends[count]:
            count += 1
        return count

    def look(self) -> bool:
        """Say whether there are results to yield, also of one that still runs."""
        if self.ended:
            return True
        if self.ledger is None or not self.running:
            return False
        now = time.monotonic()
        if now >= self._looked + LOOK:
            self._looked = now
            # What was there at the last look has reached every CPU by now.
            self._read, self._seen = self._seen, self.made(self.ledger.ends())
        return self._readable() > self.taken

    def _readable(self) -> int:
        # The last result waits for the end of the worker, after which its slot is free.
        return min(self._read, self.stop - 1)

    def end(self, ends: Sequence[int], made: int, last: Optional[Ending]) -> None:
        """Take note of how it has ended: with so many records, and with an outcome after them."""
        self.running = False
        self.argses, self.kwargses = [], None
        self.future = None
        self.last = last
        self._records = ()
        if self.ledger is not None and made > self.taken:
            self._records = self.ledger.records(ends, self.taken, made)
            if self._records.data is None:
                return  # it will be read from as they are asked for
        self.close()

    def results(self) -> Iterator[Any]:
        """
        Return what ``look`` has found, to be iterated over; that raises what a call has raised.

        Of a batch that still runs all is read before this returns.
        """
        records = self._records
        ended = records is not None
        if records is not None:
            self.taken = self.stop
        else:
            assert self.ledger is not None  # noqa: S101  # that of one that runs
            start, self.taken = self.taken, self._readable()
            records = self.ledger.records(self.ledger.ends(), start, self.taken)
        if isinstance(records, Records) and records.data == b"" and not (ended and self.last):
            return repeat(None, len(records))  # None has an empty record, and nothing else has
        return self._values(records if ended else [*records], ended=ended)

    def _values(self, records: Iterable[Any], *, ended: bool) -> Iterator[Any]:
        for record in records:
            if record is None:
                yield None
            elif type(record) is bytes:
                yield _load(record)
            else:
                yield _told(record)
        if ended and self.last is not None:
            yield self._last()

    def _last(self) -> Any:
        last, self.last = self.last, None  # nothing here is to refer to what has been yielded
        assert last is not None  # noqa: S101
        return last.get()

    def close(self) -> None:
        """Let go of the ledger; the worker has its own hold of it."""
        ledger, self.ledger = self.ledger, None
        if ledger is not None:
            ledger.close()


def _load(pickled: bytes) -> Any:
    try:
        return pickle.loads(pickled)  # noqa: S301
    except Exception:  # noqa: BLE001  # told as it is where a job has but one call
        return _told(Record(RESULT, 0, [bytearray(), bytearray(pickled)]))


def _told(record: Record) -> Any:
    """Return what a call has returned, or raise what it has raised."""
    return Outcome(Frame(record.kind, 0, record.exitcode, record.segments), None).get()
