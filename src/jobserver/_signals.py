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
import os
import signal
import threading
from collections.abc import Iterable
from threading import get_ident
from typing import Any

_NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)
_DEFERRED = tuple(int(number) for number in (*_NAMES, signal.SIGUSR2, signal.SIGCHLD))
# The function below signal.pthread_sigmask, which makes an enum of each signal.
_mask: Any = _signal.pthread_sigmask
_BLOCK = int(signal.SIG_BLOCK)
_SETMASK = int(signal.SIG_SETMASK)


# What workers get that are started by a thread of ours, by that thread.
_handed_on: dict[int, Iterable[int]] = {}
# What the main thread had blocked when it came into our code; None while it is outside.
_outside: Any = None
_main = threading.main_thread().ident


class Deferred:
    """Signals are blocked inside; costs nothing inside of another one."""

    __slots__ = ("_before",)

    _before: Any  # of the outermost one

    def __enter__(self) -> Deferred:  # noqa: PYI034  # Self came with Python 3.11
        global _outside  # noqa: PLW0603
        self._before = None
        if _outside is None and get_ident() == _main:
            before = _mask(_BLOCK, ())
            try:
                # Runs the handlers of what has come just before; if one raises we are not in yet.
                _mask(_BLOCK, _DEFERRED)
                self._before = _outside = before
            except BaseException:
                _outside = None
                _mask(_SETMASK, before)
                raise
        return self

    def __exit__(self, *exc: object) -> None:
        global _outside  # noqa: PLW0603
        before, self._before = self._before, None
        if before is not None:
            # Not what is in `_outside`: an exception may have come as signals had just been lifted.
            _outside = None
            _mask(_SETMASK, before)

    def lifted(self) -> _Lifted:
        """Return a context in which signals are let through, as they were outside."""
        return _Lifted()


class _Lifted:
    __slots__ = ("_outside",)

    def __init__(self) -> None:
        self._outside: Any = None

    def __enter__(self) -> None:
        global _outside
        if _outside is not None and get_ident() == _main:
            # A handler may come back into our code, where signals are then to be blocked again.
            self._outside, _outside = _outside, None
            try:
                _mask(_SETMASK, self._outside)
            except BaseException:
                # What was pending has raised, and nobody will call __exit__.
                self.__exit__()
                raise

    def __exit__(self, *exc: object) -> None:
        global _outside  # noqa: PLW0603
        if self._outside is not None:
            try:
                _mask(_BLOCK, _DEFERRED)
            finally:
                _outside = self._outside


class _Inner(Deferred):
    """Inside of another one, or in another thread than the main one: nothing is to be done."""

    __slots__ = ()

    def __enter__(self) -> Deferred:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


_INNER = _Inner()


def deferred() -> Deferred:
    """Return a context in which signals wait."""
    # While the main thread has them wait, another thread's need nothing, either.
    return Deferred() if _outside is None else _INNER


def lifted() -> _Lifted:
    """Return a context in which signals are let through, wherever they wait."""
    return _Lifted()


def outside() -> Iterable[int]:
    """Return which signals this thread has blocked outside of our code: what a worker inherits."""
    if _outside is not None and get_ident() == _main:
        return _outside  # type: ignore[no-any-return]
    mine = _handed_on.get(get_ident())
    return _mask(_BLOCK, ()) if mine is None else mine


def stand_aside(mask: Iterable[int]) -> None:
    """
    In a thread of ours: leave signals to the main thread, which so can have them wait.

    Args:
        mask: What workers that are started by this thread are to have blocked.
    """
    _handed_on[get_ident()] = mask
    _mask(_BLOCK, _DEFERRED)


def step_back() -> None:
    """At the end of that thread."""
    _handed_on.pop(get_ident(), None)


def restore(mask: Iterable[int]) -> None:
    """In a new worker: have just these signals blocked."""
    global _outside  # noqa: PLW0603
    _outside = None
    _mask(_SETMASK, mask)


def _after_fork_in_child() -> None:
    global _main, _outside
    if _main != get_ident():
        _main, _outside = get_ident(), None  # another thread's signals were deferred
    _handed_on.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
