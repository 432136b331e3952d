# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
``JobserverExecutor.map`` with batches whose sizes it finds out by itself.

Some batches are always queued or running, one more than there are slots. When one ends, the
executor's thread cuts the next, so the map goes on whether or not somebody iterates over it; inputs
that are read lazily are read by who iterates.

Guarantees:

* ``close`` takes no lock that its caller may hold, as the garbage collector may call it at any
  instant: if the lock is not free, whoever has it closes.
* Nothing here refers to the executor itself, nor is the lock held while the engine is called.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from concurrent.futures import Future as StdFuture
from concurrent.futures import TimeoutError as LateError
from typing import Any, Callable, ContextManager, Optional

from ._backlog import Call
from ._batch import LOOK, Batch
from ._batches import Batches
from ._casualty import WorkerDied, of_end
from ._engine import Engine
from ._promise import Promise
from ._sleeper import Sleeper


class _Ending:
    """What a promise has come to, as a batch knows it."""

    def __init__(self, value: Any, error: Optional[BaseException]) -> None:
        self._value = value
        self._error = error
        self.died = isinstance(error, WorkerDied)

    def get(self) -> Any:
        """Return the value or raise the error."""
        if self._error is not None:
            raise self._error
        return self._value


class ExecutorMap:
    """
    One map.

    Args:
        engine: Where to submit.
        batches: What to submit.
        lazy: Says whether inputs may still be read, by who iterates; None where all have been.
    """

    def __init__(
        self, engine: Engine, batches: Batches, lazy: Optional[Callable[[], bool]]
    ) -> None:
        self._engine = engine
        self._batches = batches
        self._lazy = lazy
        self._slots = engine.jobserver._shared.slots.slots
        self._lock = threading.Lock()
        self._changed = Sleeper(None, seeks=False)
        self._open: dict[Promise[Any], Batch] = {}
        self._cut = 0  # batches that are queued or running, or about to be
        self._over: Optional[BaseException] = None  # why no more is submitted
        self._closed = False
        self._cleaned = False

    def feed(self, *, read: bool) -> None:
        """
        Submit what there is to submit.

        Args:
            read: Whether that includes inputs that have not been read yet.

        Raises:
            Exception: What reading the inputs, or submitting, has raised.
        """
        while True:
            with self._locked():
                batch = self._next(read=read)
                if batch is None:
                    return
                self._cut += 1
            try:
                call = Call(*self._batches.parts(batch), batch.ledger)
                promise = self._engine.submit(call, more=True)
            except BaseException as error:
                if self._refused(batch, error, reading=read):
                    raise
                return
            with self._locked():
                self._open[promise] = batch
                self._batches.submitted(batch, promise)
            promise.add_done_callback(self._on_done)
            if self._closed:
                promise.cancel()

    def _refused(self, batch: Batch, error: BaseException, *, reading: bool) -> bool:
        """A batch could not be submitted; says whether that is to be told at once."""
        with self._locked():
            self._cut -= 1
            if self._cut and not reading:
                self._batches.defer(batch)  # until one of the others has ended
                return False
            self._fail(batch, CancelledError() if self._engine.cancelling else error)
            return True

    def _next(self, *, read: bool) -> Optional[Batch]:
        if self._over is not None or self._closed or self._cut > self._slots:
            return None
        batch = self._batches.next(self._slots, read=read)
        if batch is None and self._cut < self._slots and self._batches.can_rob():
            batch = self._batches.next(self._slots, read=False) if self._batches.rob() else None
        return batch

    def _fail(self, batch: Batch, error: BaseException) -> None:
        """A batch will not be made, and no other will be submitted."""
        self._over = self._over or error
        self._batches.fail(batch, _Ending(None, error))
        self._batches.give_up(_Ending(None, self._over))
        self._changed.wake()

    def _on_done(self, promise: StdFuture[Any]) -> None:
        cancelled = promise.cancelled()
        error = CancelledError() if cancelled else StdFuture.exception(promise)
        with self._locked():
            batch = self._open.pop(promise)  # type: ignore[call-overload]
            self._cut -= 1
            if error is not None and (cancelled or self._engine.broken is not None):
                self._fail(batch, error)
            else:
                value = None if error is not None else StdFuture.result(promise)
                self._batches.settle(batch, _Ending(value, error))
                if self._over is not None:
                    self._batches.give_up(_Ending(None, self._over))
            self._changed.wake()
        with contextlib.suppress(Exception):  # the batch that it befell has it
            self.feed(read=self._lazy is None)

    def results(self, end: Optional[float]) -> Iterator[Any]:
        """
        Yield the results in order; TimeoutError past ``end``.

        Raises:
            Exception: What a call has raised, in its turn.
        """
        try:
            while True:
                if self._lazy is not None and self._lazy():
                    self.feed(read=True)
                with self._locked():
                    head = self._batches.head
                    found = head.results() if head is not None and head.look() else None
                if head is None:
                    if self._over is not None:
                        raise self._over
                    return
                if found is None:
                    self._wait(head, end)
                    continue
                try:
                    yield from found
                except Exception as error:  # noqa: BLE001  # of any call
                    told = of_end(error, died=False)
                    raise told.with_traceback(None) from told.__cause__
                with self._locked():
                    if head.ended:
                        self._batches.pop()
        finally:
            self.close()

    def _wait(self, head: Batch, end: Optional[float]) -> None:
        """Wait until the head has results, or something else has changed."""
        patient: ContextManager[Any] = contextlib.nullcontext()
        if end is None:
            patient = self._engine.awaiting(head.future or self)
        with patient:
            while True:
                with self._locked():
                    if head.look():
                        return
                pause = LOOK if end is None else min(LOOK, end - time.monotonic())
                if pause <= 0:
                    raise LateError
                if not self._changed.sleep(pause):
                    return
                self.feed(read=False)

    def close(self) -> None:
        """Submit no more, and have what has not begun cancelled."""
        self._closed = True
        self._clean()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:
            if self._closed:
                self._clean()

    def _clean(self) -> None:
        if self._cleaned or not self._lock.acquire(blocking=False):
            return
        try:
            self._cleaned = True
            promises = list(self._open)
            self._batches.withdraw()
            self._batches.close()
        finally:
            self._lock.release()
        for promise in promises:
            promise.cancel()
