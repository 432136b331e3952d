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
from typing import Any

_NAMES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1)
_DEFERRED = tuple(int(number) for number in (*_NAMES, signal.SIGUSR2, signal.SIGCHLD))
# The function below signal.pthread_sigmask, which makes an enum of each signal.
_mask: Any = _signal.pthread_sigmask
_BLOCK = int(signal.SIG_BLOCK)
_SETMASK = int(signal.SIG_SETMASK)


# What the main thread had blocked when it came into our code; None while it is outside.
_outside: Any = None
# Whether the main thread is where signals wait, rather than in a call that lets them through.
_waiting = False


class Deferred:
    """Signals are blocked inside; may be nested."""

    __slots__ = ("_before", "_outermost")

    def __init__(self) -> None:
        self._before: Any = None
        self._outermost = False

    def __enter__(self) -> Deferred:  # noqa: PYI034  # Self came with Python 3.11
        global _outside, _waiting  # noqa: PLW0603
        if not _waiting and threading.get_ident() == _main_ident():
            before = _mask(_BLOCK, ())
            try:
                # Runs the handlers of what has come just before; if one raises we are not in yet.
                _mask(_BLOCK, _DEFERRED)
            except BaseException:
                _mask(_SETMASK, before)
                raise
            _waiting = True
            self._before = before
            if _outside is None:
                _outside = self._before
                self._outermost = True
        return self

    def __exit__(self, *exc: object) -> None:
        global _outside, _waiting  # noqa: PLW0603
        before, self._before = self._before, None
        if before is not None:
            if self._outermost:
                _outside = None
            _waiting = False
            _mask(_SETMASK, before)

    def lifted(self) -> _Lifted:
        """Return a context in which signals are let through, as they were outside."""
        return _Lifted(self._before)


class _Lifted:
    __slots__ = ("_outside",)

    def __init__(self, outside: Any) -> None:
        self._outside = outside

    def __enter__(self) -> None:
        global _waiting  # noqa: PLW0603
        if self._outside is not None:
            _waiting = False
            try:
                _mask(_SETMASK, self._outside)
            except BaseException:
                # What was pending has raised, and nobody will call __exit__.
                self.__exit__()
                raise

    def __exit__(self, *exc: object) -> None:
        global _waiting  # noqa: PLW0603
        if self._outside is not None:
            try:
                _mask(_BLOCK, _DEFERRED)
            finally:
                _waiting = True


class DeferringLock:
    """A lock under which signals wait: so that no handler waits for what its own thread holds."""

    __slots__ = ("_deferred", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deferred = Deferred()  # of whoever holds the lock

    def acquire(self, *, blocking: bool = True) -> bool:
        """Acquire the lock; False if that is not possible without blocking."""
        mine = Deferred()
        mine.__enter__()
        if not self._lock.acquire(blocking):
            mine.__exit__()
            return False
        self._deferred = mine
        return True

    def release(self) -> None:
        """Release it."""
        mine = self._deferred
        self._lock.release()
        mine.__exit__()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


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
    _start_afresh()
    _mask(_SETMASK, mask)


def _start_afresh() -> None:
    # The thread that has forked may not be the one that was the main thread.
    global _outside, _waiting  # noqa: PLW0603
    _outside = None
    _waiting = False


os.register_at_fork(after_in_child=_start_afresh)


def _main_ident() -> Any:
    return threading.main_thread().ident
