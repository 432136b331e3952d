# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Keep Ctrl-C, and other signals whose handlers may raise, out of where books are being kept.

A Python handler runs between any two bytecodes, so an exception that it raises could leave a slot
taken and not noted, or a thread leading that does not lead. ``deferred`` blocks the signals in the
main thread, where alone handlers run; what has come meanwhile is handled as they are unblocked,
when the books are right. ``Deferred.lifted`` lets them through while a call blocks.

In a program with more threads the kernel may deliver to another one, and Python then runs the
handler here all the same: there this makes such an exception rare, not impossible.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Iterable
from typing import Any

_NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)
_DEFERRED = tuple(int(number) for number in (*_NAMES, signal.SIGUSR2, signal.SIGCHLD))
# The function below signal.pthread_sigmask, which makes an enum of each signal.
_mask: Any = _signal.pthread_sigmask
_BLOCK = int(signal.SIG_BLOCK)
_SETMASK = int(signal.SIG_SETMASK)


# What the main thread had blocked when it came into our code; None while it is outside.
_outside: Any = None


class Deferred:
    """Signals are blocked inside; may be nested."""

    __slots__ = ("_before", "_outermost")

    def __init__(self) -> None:
        self._before: Any = None
        self._outermost = False

    def __enter__(self) -> Deferred:  # noqa: PYI034  # Self came with Python 3.11
        global _outside  # noqa: PLW0603
        if threading.get_ident() == _main_ident():
            before = _mask(_BLOCK, ())
            try:
                # Runs the handlers of what has come just before; if one raises we are not in yet.
                _mask(_BLOCK, _DEFERRED)
            except BaseException:
                _mask(_SETMASK, before)
                raise
            self._before = before
            if _outside is None:
                _outside = self._before
                self._outermost = True
        return self

    def __exit__(self, *exc: object) -> None:
        global _outside  # noqa: PLW0603
        before, self._before = self._before, None
        if before is not None:
            if self._outermost:
                _outside = None
            _mask(_SETMASK, before)

    def lifted(self) -> _Lifted:
        """Return a context in which signals are let through, as they were outside."""
        return _Lifted(self._before)


class _Lifted:
    __slots__ = ("_outside",)

    def __init__(self, outside: Any) -> None:
        self._outside = outside

    def __enter__(self) -> None:
        if self._outside is not None:
            try:
                _mask(_SETMASK, self._outside)
            except BaseException:
                # What was pending has raised, and nobody will call __exit__.
                _mask(_BLOCK, _DEFERRED)
                raise

    def __exit__(self, *exc: object) -> None:
        if self._outside is not None:
            _mask(_BLOCK, _DEFERRED)


def deferred() -> Deferred:
    """Return a context in which signals wait."""
    return Deferred()


def outside() -> Iterable[int]:
    """Return which signals this thread has blocked outside of our code: what a worker inherits."""
    if _outside is not None and threading.get_ident() == _main_ident():
        return _outside  # type: ignore[no-any-return]
    return _mask(_BLOCK, ())  # type: ignore[no-any-return]


def restore(mask: Iterable[int]) -> None:
    """In a new worker: have just these signals blocked."""
    global _outside  # noqa: PLW0603
    _outside = None
    _mask(_SETMASK, mask)


def _main_ident() -> Any:
    return threading.main_thread().ident
