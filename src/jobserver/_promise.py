# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The futures of an executor: the standard library's, and they know who is going to resolve them.

Guarantees:

* Whoever takes a promise out of what is pending, and nobody else, tells its waiters what is next.
* A cancelled promise is forgotten at once: its waiters are told, its arguments are let go.
* A promise that is done refers to its result alone.
* What a signal handler raises while a promise is waited for comes through, and nothing else. (The
  standard library's wait may raise RuntimeError then: Ctrl-C comes between two bytecodes, and finds
  the lock of its condition released but not yet noted as such.)
"""

from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import CancelledError
from concurrent.futures import Future as StdFuture
from concurrent.futures import TimeoutError as LateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
)
from typing import TYPE_CHECKING, Any, ContextManager, Optional, TypeVar

from ._signals import deferred, lifted

if TYPE_CHECKING:
    from ._engine import Engine
    from ._future import Future

T = TypeVar("T")

_OVER = (FINISHED, CANCELLED, CANCELLED_AND_NOTIFIED)


class Promise(StdFuture[T]):
    """
    What ``JobserverExecutor.submit`` returns.

    Inside a job, ``result()`` and ``exception()`` without a timeout lend the job's own slot while
    the executor finds no other, as ``Jobserver.submit`` does. ``concurrent.futures.wait`` and
    ``as_completed`` do not.
    """

    # Of the class, as most promises never need another value.
    job: Optional[Future[Any]] = None  # while running
    # What the sleep_fn of the Jobserver has said about this call.
    admitted = False
    asks_at = 0.0
    # In the queue from which workers take calls; 0 outside of it (see ``_calls``).
    number = 0
    alone = False  # it is no call for there

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine: Optional[Engine] = engine  # until done

    def cancel(self) -> bool:
        """Cancel the call, unless it is running or done; says whether it is cancelled now."""
        engine = self.engine
        if engine is None or self.done():
            return super().cancel()
        with deferred():  # else Ctrl-C could leave a call that is nowhere and not cancelled
            mine = engine.forget(self)
            if mine:
                with self._condition:
                    self._state = CANCELLED
                    self._condition.notify_all()
        if not mine:
            # A worker has it; or it is about to be started, or to be cancelled by somebody else.
            return self.cancelled() if self.number else super().cancel()
        private: Any = self
        private._invoke_callbacks()
        self.told()
        return True

    def running(self) -> bool:
        """Say whether the call is being made."""
        engine = self.engine
        if self.number and engine is not None:
            engine.look_up()
        return super().running()

    def begin(self) -> None:
        """A worker has begun with the call: become running, unless it is done by now."""
        with self._condition:
            if self._state == PENDING:
                self._state = RUNNING

    def drop(self) -> None:
        """Cancel the call, which is no more pending, and tell those who wait for it."""
        if super().cancel():
            self.told()

    def told(self) -> bool:
        """Become running, or tell the waiters that this is cancelled; for the owner alone."""
        if self.set_running_or_notify_cancel():
            return True
        self.engine = None
        return False

    def resolve(self, value: Any, error: Optional[BaseException] = None) -> None:
        """Set the result, or the exception, and call the callbacks."""
        try:
            if error is None:
                self.set_result(value)
            else:
                self.set_exception(error)
        except BaseException:  # noqa: BLE001
            # A callback wants to end the thread (SystemExit), which others need; or the user has
            # set a result by hand. It is told as any failure of a thread is.
            kind, caught, traceback = sys.exc_info()
            args: Any = (kind, caught, traceback, threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(args))
        finally:
            self.engine = None
            if self.job is not None:
                self.job = None

    def result(self, timeout: Optional[float] = None) -> T:
        """Return what the call returned, or raise what it raised; TimeoutError if not in time."""
        try:
            error = self._settled(timeout)
            if error is not None:
                raise error
            private: Any = self
            value: T = private._result
            return value
        finally:
            # Else the exception, its traceback, this frame and the promise are a cycle.
            error = None
            del self

    def exception(self, timeout: Optional[float] = None) -> Optional[BaseException]:
        """Return what the call raised, None for nothing; TimeoutError if not in time."""
        return self._settled(timeout)

    def _settled(self, timeout: Optional[float]) -> Optional[BaseException]:
        """Wait for the end of the call; return what it raised."""
        if self._state not in _OVER:
            with self._patience(timeout):
                self._await(timeout)
        # Both final from here on, so no lock is needed to read them.
        if self._state == FINISHED:
            return self._exception
        raise CancelledError if self._state in _OVER else LateError

    def _await(self, timeout: Optional[float]) -> None:
        """Wait as one of those whom the condition notifies, with signals let through meanwhile."""
        told = threading.Lock()
        told.acquire()
        private: Any = self._condition
        with deferred():
            with self._condition:
                if self._state in _OVER:
                    return
                private._waiters.append(told)
            try:
                with lifted():
                    if timeout is None:
                        told.acquire()
                    elif timeout > 0:
                        told.acquire(timeout=timeout)
            finally:
                with self._condition, contextlib.suppress(ValueError):
                    private._waiters.remove(told)

    def _patience(self, timeout: Optional[float]) -> ContextManager[Any]:
        engine = self.engine
        if engine is None:
            return contextlib.nullcontext()
        engine.refuse_foreign()
        return contextlib.nullcontext() if timeout is not None else engine.awaiting(self)
