# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How a job ended, as its submitter will be told, again and again."""

from __future__ import annotations

import pickle
from _thread import RLock
from typing import Any, Optional

from ._errors import SubmissionDied, Untransferable, shown
from ._wire import DIED, RESULT, Frame


class RemoteTraceback(Exception):
    """Shows the worker's traceback as the cause of what is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\nin the worker:\n{self.text}"


class Outcome:
    """
    The answer of a worker, or its death.

    The answer is unpickled when it is first asked for, by the thread that asks: unpickling runs
    the code of the pickled classes, which must not hold up other Futures.
    """

    __slots__ = ("_error", "_frame", "_lock", "_value", "died", "well")

    def __init__(self, frame: Optional[Frame], death: Optional[SubmissionDied]) -> None:
        self._lock: Any = RLock()
        self._frame = frame
        self.died = frame is None or frame.kind == DIED
        self.well = frame is not None and frame.kind == RESULT
        self._value: Any = None
        self._error: Optional[BaseException] = death

    def get(self) -> Any:
        """Return the value or raise the error: always the same one."""
        with self._lock:
            if self._frame is not None:
                self._decode(self._frame)
                self._frame = None
            if self._error is not None:
                # Without the traceback of earlier calls, which would grow with each of them.
                raise self._error.with_traceback(None)
            return self._value

    def _decode(self, frame: Frame) -> None:
        try:
            loaded = frame.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # whatever the pickled classes raise
            self._error = _unreadable(frame, error)
            return
        if frame.kind == RESULT:
            self._value = loaded
            return
        if not isinstance(loaded, BaseException):
            self._error = _unreadable(frame, TypeError(f"it became a {type(loaded).__name__}"))
            return
        if frame.text:
            # Not by assignment, which a class may refuse: a frozen dataclass does.
            BaseException.__setattr__(loaded, "__cause__", RemoteTraceback(frame.text))
        if frame.kind == DIED:
            self._error = SubmissionDied(frame.exitcode, f"{type(loaded).__name__} ended it")
            self._error.__cause__ = loaded
        else:
            self._error = loaded


def value_of(pickled: bytes) -> Any:
    """Return the result of a job that is there as a plain pickle; raises what an Outcome would."""
    try:
        return pickle.loads(pickled)  # noqa: S301
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _unreadable(Frame(RESULT, 0, 0, [b"", pickled]), error) from error


def _unreadable(frame: Frame, error: BaseException) -> BaseException:
    what = "result" if frame.kind == RESULT else "exception"
    failure: BaseException
    why = shown(error)
    if frame.kind == DIED:
        failure = SubmissionDied(frame.exitcode, f"its cause cannot be unpickled here: {why}")
    else:
        failure = Untransferable(f"the {what} of the job cannot be unpickled here: {why}")
    failure.__cause__ = RemoteTraceback(frame.text) if frame.text else error
    return failure
