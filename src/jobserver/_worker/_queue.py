# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Make the calls that stand in the queue of an executor or a map, one after the other, on one slot.

The queue is shared by all of its workers: a FIFO of *claims*, each a call's number and
where its pickle is, and the *space*, a file with these pickles. To read a claim is to take the
call: the kernel gives it to one reader, be that a worker or the submitter who wants it back.

Guarantees:

* What is in the FIFO has been begun by nobody. A worker takes a call when it is about to make it.
* It notes the number in its ledger before it begins, and the result before it claims the next call.
  So of a worker that has died it is known which call it was at; what it had claimed and not noted
  has not begun.
* Calls share a slot only one after the other, and each ends as a job does that is alone: what it
  leaves behind is undone, or the worker ends.
* A call whose end is not just a small result (an exception, say, or a process that cannot stay) is
  the last one: that end is told as that of the whole drain, and so as for any other job.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
import time
from collections.abc import Iterator
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any, Optional

from jobserver import _forking
from jobserver._dump import _PLAIN
from jobserver._errors import Untransferable, shown
from jobserver._slots._own import own_slot
from jobserver._wire import RESULT

from . import _stay
from ._answer import Answer, end_copy
from ._ledger import FIRST, Ledger
from ._log import Log
from ._process import finish_jobs, flush_streams

#: The number of a call, and of the pickle of it the place and the size.
CLAIM = struct.Struct("<QII")
#: So many calls a drain makes at most; its ledger has twice as many cells, first those of the
#: results and then the numbers.
MOST = 512

# How long a drain goes on claiming, in seconds: results are told at its end.
_LASTS = 0.004
# A call that takes longer is told at once: so it ends its drain.
_SHORT = 0.001


class Queue:
    """
    The descriptors of a queue; in the submitter, which makes them, and in a worker.

    Args:
        claims: The FIFO, non-blocking.
        space: The file.
    """

    __slots__ = ("_files", "claims", "space")

    def __init__(self, claims: int, space: int) -> None:
        self.claims = claims
        self.space = space
        self._files = _files(claims, space)

    @contextlib.contextmanager
    def handed_over(self) -> Iterator[None]:
        """Meanwhile a worker is started; if it is forked, it is to keep the descriptors."""
        fds = {self.claims, self.space}
        with _forking.books_lock():
            _forking.owned.difference_update(fds)
        try:
            yield
        finally:
            with _forking.books_lock():
                _forking.owned.update(fds)

    def is_open(self) -> bool:
        """Say whether no call has closed the files, and opened others under their numbers."""
        try:
            return _files(self.claims, self.space) == self._files
        except OSError:
            return False

    def claim(self) -> Optional[tuple[int, int, int]]:
        """Take the next call; None if there is none, or nobody can tell any more."""
        if not self.is_open():
            return None
        try:
            return CLAIM.unpack(os.read(self.claims, CLAIM.size))
        except BlockingIOError:
            return None

    def call(self, place: int, size: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Unpickle a call that was claimed."""
        try:
            fn, args, kwargs = pickle.loads(os.pread(self.space, size, place))  # noqa: S301
        except Exception as error:
            raise Untransferable(
                f"the call could not be unpickled in the worker: {shown(error)}"
            ) from error
        return fn, args, kwargs

    def close(self) -> None:
        """In a worker: let go of the files."""
        if self.is_open():
            os.close(self.claims)
            os.close(self.space)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            raise TypeError("a queue of calls is only for the workers of its executor")
        return _receive, (reduction.DupFd(self.claims), reduction.DupFd(self.space))


def _files(claims: int, space: int) -> tuple[int, int]:
    return os.fstat(claims).st_ino, os.fstat(space).st_ino


def _receive(claims: Any, space: Any) -> Queue:
    return Queue(claims.detach(), space.detach())


def drain(queue: Queue, ledger: Ledger) -> Any:
    """
    Make calls while there are some, for as long as they are short and not for long.

    Returns:
        What the last call has returned, if its number is in the ledger and its result is not.
    """
    log = Log(ledger)
    try:
        return _drain(queue, log)
    finally:
        log.close()
        queue.close()


def _drain(queue: Queue, log: Log) -> Any:
    epoch, plain, small, cells = _forking.epoch(), _PLAIN, log.small.dumps, log.cells
    now = time.monotonic()
    end = now + _LASTS
    for place in range(FIRST, FIRST + MOST):
        claim = queue.claim()
        if claim is None:
            break
        cells[place + MOST], *where = claim
        fn, args, kwargs = queue.call(*where)
        value = fn(*args, **kwargs)
        del fn, args, kwargs  # what they refer to is not to outlive the call
        if _forking.epoch() != epoch:
            end_copy(Answer(RESULT, "", []))
        try:
            if value is None:
                data = b""
            else:
                data = pickle.dumps(value, 5) if type(value) in plain else small(value)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException:  # noqa: BLE001  # large, or else told as it is where a call is alone
            return value
        if log.at + len(data) > len(log.memory) or not _finished():
            return value
        del value
        stop = log.at + len(data)
        log.memory[log.at : stop] = data
        cells[place] = stop << 1
        log.at = stop
        before, now = now, time.monotonic()
        if now > end or now - before > _SHORT:
            break
    return None


def _finished() -> bool:
    """End a call as a job ends; False if no other one may be made in this process."""
    finish_jobs()
    if own_slot().lent:
        return False
    try:
        if not _stay.tidy():
            return False
    except Exception:  # noqa: BLE001  # the call has replaced os.environ, say
        return False
    flush_streams()
    return True
