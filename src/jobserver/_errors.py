# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What jobserver raises, next to the built-in exceptions."""

from __future__ import annotations

import signal
from typing import Optional


class Blocked(Exception):
    """
    No slot, or no result, was to be had within the timeout.

    Raised by ``Jobserver.submit`` (nothing has started) and by ``Future.result`` (the job runs on).
    """


class CallbackRaised(Exception):
    """
    A callback registered with ``Future.when_done`` raised; its exception is the ``__cause__``.

    The Future's own result is untouched: make the interrupted call again to get it, or to meet
    the next failed callback.

    Args:
        seqno: What ``when_done`` returned for the failed callback: 0 for a Future's first.
    """

    seqno: int

    def __init__(self, seqno: int) -> None:
        if not isinstance(seqno, int):
            raise TypeError(f"seqno must be an int, not {type(seqno).__name__}")
        super().__init__(seqno)
        self.seqno = seqno

    def __repr__(self) -> str:
        return f"CallbackRaised(seqno={self.seqno})"

    __str__ = __repr__


class SubmissionDied(Exception):
    """
    The worker ended without a result: by a signal, ``os._exit``, ``sys.exit``, exec, ...

    When the worker could still tell why (``SystemExit``, ``KeyboardInterrupt``), that exception
    is the ``__cause__``, with the worker's traceback.

    Args:
        exitcode: The exit status, or minus the number of the signal that killed the worker;
            None when somebody else reaped the process first.
        detail: What else is known, in words.
    """

    exitcode: Optional[int]

    def __init__(self, exitcode: Optional[int] = None, detail: str = "") -> None:
        super().__init__(exitcode, detail)
        self.exitcode = exitcode
        self.detail = detail

    def __str__(self) -> str:
        if self.exitcode is None:
            how = "the worker ended without a result; its exit status is not known"
        elif self.exitcode < 0:
            how = f"the worker was killed by {_signal_name(-self.exitcode)} before it had a result"
        else:
            how = f"the worker ended with exit status {self.exitcode} before it had a result"
        return f"{how}; {self.detail}" if self.detail else how


class Untransferable(RuntimeError):
    """
    What fn takes, returns or raises could not be pickled, or not be unpickled on the other side.

    Args:
        message: Which of them, and why.
        why: What pickling raised; None if it was unpickling, or if that cannot travel itself.
    """

    def __init__(self, message: str, why: Optional[BaseException] = None) -> None:
        super().__init__(message)
        self.why = why


class Unguarded(RuntimeError):
    """A worker that imports the main module has met work being submitted there."""


def shown(error: Optional[BaseException]) -> str:
    """Return the repr of an exception, whatever its class makes of that."""
    try:
        return repr(error)
    except Exception:  # noqa: BLE001  # of the user's; the exception itself matters more
        return f"{type(error).__qualname__} (its repr fails)"


def _signal_name(number: int) -> str:
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"
