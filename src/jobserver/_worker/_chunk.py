# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Several calls in one worker.

A chunk of a size that the user has chosen is made to its end, or to the first call that fails: the
iteration will end there. A *shared* chunk belongs to a map that chooses the sizes itself. In it a
failure is that of one call, others may take calls away, and the worker gives back what it has not
begun when the chunk lasts too long.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from jobserver import _forking
from jobserver._dump import _PLAIN, load
from jobserver._wire import DIED, RESULT

from ._answer import Answer, answer_of, end_copy, raised
from ._ledger import FIRST, Ledger, frame

if TYPE_CHECKING:
    from ._log import Log

# So much of a shared chunk is out of reach for others, in seconds: looking whether they have taken
# calls away costs as much as a short call.
_STRIDE = 0.001
# A shared chunk whose results are longer than so many bytes is ended: they lie in memory.
_MOST_BYTES = 1 << 24


class Done(NamedTuple):
    """How far a chunk has come by itself: so many calls were made, in so many seconds."""

    made: int
    seconds: float


class Chunk(NamedTuple):
    """
    Calls of ``fn``, and where to write what they come to.

    Args:
        fn: What to call.
        argses: The positional arguments of each call; or just the argument, if they are singles.
        kwargses: The keyword arguments of each; None where none has any.
        ledger: Has a place for each call.
        patience: None for a chunk of a chosen size; else after how many seconds a shared one gives
            back what it has not begun.
        singles: Each call has one argument, and no other. A tuple around each of them would cost
            more than all else that there is to a call.
    """

    fn: Callable[..., Any]
    argses: Sequence[Any]
    kwargses: Optional[Sequence[Mapping[str, Any]]]
    ledger: Ledger
    patience: Optional[float]
    singles: bool

    def part(self, start: int, stop: int) -> tuple[Callable[[Any], Any], Iterable[Any]]:
        """Return some of the calls: what to call with one argument, and that for each."""
        fn, argses, kwargses = self.fn, self.argses[start:stop], self.kwargses
        if self.singles:
            return fn, argses
        if kwargses is None:
            return lambda args: fn(*args), argses
        return lambda both: fn(*both[0], **both[1]), zip(argses, kwargses[start:stop])


def run_chunk(*parts: Any) -> Done:
    """Make the calls of ``Chunk(*parts)``; or some of them, see there."""
    from ._log import Log  # which only workers with chunks need

    chunk = Chunk(*parts)
    log = Log(chunk.ledger)
    begun = time.monotonic()
    try:
        if chunk.patience is None or chunk.ledger.count == 1:
            count = _make(chunk, log, 0, chunk.ledger.count)
        else:
            count = _make_shared(chunk, log, begun + chunk.patience)
    finally:
        log.close()
    return Done(count, time.monotonic() - begun)


def _make_shared(chunk: Chunk, log: Log, end: float) -> int:
    stride, start, now = 1, 0, time.monotonic()
    while start < log.limit():
        stop = min(start + stride, log.limit())
        if not log.lock(start, stop):
            if stride == 1:
                break
            stride = 1  # some of these have been taken away
            continue
        # What is locked now cannot be taken; what was taken before, and let go of, is not ours.
        stop = min(stop, log.limit())
        if start >= stop:
            break
        _make(chunk, log, start, stop)
        before, now = now, time.monotonic()
        if now > end or log.at > _MOST_BYTES:
            return stop
        lasted = now - before
        stride = 2 * stride if lasted < _STRIDE / 2 else max(1, int(stride * _STRIDE / lasted))
        start = stop
    return start


def _make(chunk: Chunk, log: Log, start: int, stop: int) -> int:
    """Make some calls; returns the number of the first that was not made."""
    call, inputs = chunk.part(start, stop)
    epoch, plain, dumps, small = _forking.epoch(), _PLAIN, pickle.dumps, log.small.dumps
    memory, cells, at, room = log.memory, log.cells, log.at, len(log.memory)
    place, here = start + FIRST, at << 1
    for each in inputs:
        try:
            value = call(each)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001  # it is the user's, and goes to the caller
            answer = raised(error)
            if _forking._epoch != epoch:
                end_copy(answer)
        else:
            if _forking._epoch != epoch:
                end_copy(Answer(RESULT, "", []))
            if value is None:
                cells[place] = here  # an empty record
                place += 1
                continue
            try:
                data = dumps(value, 5) if type(value) in plain else small(value)
            except BaseException:  # noqa: BLE001  # large, or else told below
                data = b""
            end = at + len(data)
            if data and end <= room:
                memory[at:end] = data
                cells[place] = here = end << 1
                at = end
                place += 1
                continue
            answer = answer_of(lambda value=value: value)  # type: ignore[misc]
        value = None
        log.at = at
        _tell(log, place - FIRST, answer)
        memory, cells, at, room = log.memory, log.cells, log.at, len(log.memory)
        place, here = place + 1, at << 1
        if answer.kind != RESULT and chunk.patience is None:
            break
    log.at = at
    return place - FIRST


def _tell(log: Log, index: int, answer: Answer) -> None:
    """Write the record of a call that has failed, or whose result is large."""
    if answer.kind == DIED:  # pickling has ended the process
        raise load(answer.payload[0], answer.payload[1:])
    text = answer.text.encode("utf-8", "backslashreplace")
    log.add(index, frame(answer.kind, answer.exitcode, [text, *answer.payload]))
