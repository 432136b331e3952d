# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Turn what a job did into a frame, whatever it did."""

from __future__ import annotations

import os
import pickle
import sys
from types import TracebackType
from typing import Any, Callable, NamedTuple, NoReturn, Optional

from jobserver._errors import Unguarded, Untransferable, shown
from jobserver._wire import DIED, RAISED, RESULT, Buffer, dump

from ._process import flush_streams


class Answer(NamedTuple):
    """What goes onto the channel; ``exitcode`` is also that of the worker process."""

    kind: int
    text: str
    payload: list[Buffer]
    exitcode: int = 0


def answer_of(call: Callable[[], Any]) -> Answer:
    """Call, and pickle what comes of it at once, as what follows may change the object."""
    try:
        value = call()
    except (SystemExit, KeyboardInterrupt) as error:
        return died(error)
    except BaseException as error:  # noqa: BLE001  # it is the user's, and goes to the caller
        return raised(error)
    try:
        return Answer(RESULT, "", dump(value))
    except Exception as error:  # noqa: BLE001
        return _unpicklable(f"the result of the job, a {_name(value)},", error, _text_of(error))
    except BaseException as error:  # noqa: BLE001
        return died(error)


def raised(error: BaseException) -> Answer:
    """Return the answer for an exception that fn has raised."""
    if issubclass(type(error), Unguarded):  # not by its `__class__`, which may raise
        # The advice says all; the way through the importing of main would only bury it.
        return _raised(error, "")
    return _raised(error, _text_of(error))


def _raised(error: BaseException, text: str) -> Answer:
    try:
        return Answer(RAISED, text, dump(error))
    except Exception as why:  # noqa: BLE001
        return _unpicklable(f"the exception of the job, a {_name(error)},", why, text)
    except BaseException as why:  # noqa: BLE001
        return died(why)


def _unpicklable(what: str, why: Exception, text: str) -> Answer:
    message = f"{what} could not be pickled: {shown(why)}"
    try:
        payload = dump(Untransferable(message, why))
        # Else the caller would learn of this second failure only.
        pickle.loads(payload[0], buffers=payload[1:])  # noqa: S301
    except Exception:  # noqa: BLE001
        payload = dump(Untransferable(message))
    return Answer(RAISED, text, payload)


def died(error: BaseException) -> Answer:
    """Return the answer for an exception that ends a process."""
    exitcode = 1
    if isinstance(error, SystemExit):
        # As the interpreter itself takes it.
        exitcode = 0 if error.code is None else error.code if isinstance(error.code, int) else 1
        exitcode &= 0xFF
    try:
        payload = dump(error)
    except BaseException:  # noqa: BLE001
        payload = dump(SystemExit(_name(error)))
    return Answer(DIED, _text_of(error), payload, exitcode)


def end_copy(answer: Answer) -> NoReturn:
    """End a process that fn has forked: with the status, and the message, that it had anywhere."""
    exitcode = 1 if answer.kind == RAISED else answer.exitcode
    try:
        if answer.kind == RAISED:
            sys.stderr.write(answer.text)
        flush_streams()
    finally:
        os._exit(exitcode)


def _text_of(error: BaseException) -> str:
    # Here, as it brings a lot along (25 ms of a spawned worker's 80 on Python 3.14), and most jobs
    # do not fail. Who forks has it already.
    import traceback

    try:
        return "".join(traceback.format_exception(type(error), error, _users(error.__traceback__)))
    except Exception as why:  # noqa: BLE001  # a __str__ or __repr__ of the user's
        return f"{_name(error)} (its traceback cannot be shown: {type(why).__name__})\n"


def _users(tb: Optional[TracebackType]) -> Optional[TracebackType]:
    """Skip our own frames at the top of a traceback, but for the last."""
    while tb is not None and tb.tb_next is not None:
        if not tb.tb_frame.f_globals.get("__name__", "").startswith("jobserver."):
            break
        tb = tb.tb_next
    return tb


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
