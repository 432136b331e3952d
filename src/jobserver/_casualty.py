# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What an executor raises where ``concurrent.futures.ProcessPoolExecutor`` would raise something else
than a Jobserver does.

A worker's death is told in both vocabularies: it is the SubmissionDied that a Jobserver's Future
raises and the BrokenProcessPool that the standard library's raises. Likewise ``sys.exit`` and
Ctrl-C in a job, which the standard library hands through as they are.
"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Callable, Optional

from ._errors import SubmissionDied, Untransferable
from ._worker._initialize import InitializerFailed

if TYPE_CHECKING:
    from ._pledge import Pledge

#: The thread of an executor has no signals to handle.
interruptible = False


def put_off(pledge: Pledge, get: Callable[[], Any]) -> bool:  # noqa: ARG001
    """Futures are told at once."""
    return False


#: Why an executor goes on no more whose initializer has failed.
BROKEN = "an initializer has failed: the executor is broken"


class WorkerDied(SubmissionDied, BrokenProcessPool):
    """SubmissionDied as an executor raises it: can be caught as BrokenProcessPool, too."""


class WorkerExited(WorkerDied, SystemExit):
    """The job has called ``sys.exit``: can be caught as SystemExit, too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.exitcode, self.detail), {"code": self.code}


class WorkerInterrupted(WorkerDied, KeyboardInterrupt):
    """Ctrl-C has reached the job: can be caught as KeyboardInterrupt, too."""


def broken(why: str, cause: Optional[BaseException]) -> BrokenProcessPool:
    """Return what everybody is told by an executor that goes on no more."""
    failure = BrokenProcessPool(why)
    failure.__cause__ = cause
    return failure


def broken_by(failure: InitializerFailed) -> BrokenProcessPool:
    """Return the same where an initializer is to blame."""
    return broken(BROKEN, failure.__cause__)


def of_start(error: BaseException) -> BaseException:
    """Return what an executor raises where a call could not be started."""
    cause = error.__cause__
    # It cannot be pickled: a Jobserver names the start method, and gives this as the cause.
    if isinstance(error, TypeError) and cause is not None:
        return cause
    return error.with_traceback(None)


def of_end(error: BaseException, *, died: bool) -> BaseException:
    """Return what an executor raises where a call has ended with ``error``."""
    if died and isinstance(error, SubmissionDied):
        return _of_death(error)
    if isinstance(error, Untransferable):
        return _of_transfer(error)
    return error


def _of_transfer(error: Untransferable) -> BaseException:
    told = error.why  # what pickling raised in the worker
    if told is None:
        told = BrokenProcessPool(str(error))
    told.__cause__ = error.__cause__
    return told


def _of_death(death: SubmissionDied) -> BaseException:
    cause = death.__cause__
    told: BaseException
    if isinstance(cause, SystemExit):
        exited = WorkerExited(death.exitcode, death.detail)
        exited.code = cause.code
        told = exited
    elif isinstance(cause, KeyboardInterrupt):
        told = WorkerInterrupted(death.exitcode, death.detail)
    elif cause is None or isinstance(cause, Exception):
        told = WorkerDied(death.exitcode, death.detail)
    else:
        return cause  # such as asyncio.CancelledError
    told.__cause__ = cause
    return told
