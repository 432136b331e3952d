# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The public JobserverExecutor: ``concurrent.futures`` over a Jobserver."""

from __future__ import annotations

import itertools
import signal
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from concurrent.futures import Future as StdFuture
from multiprocessing.context import BaseContext
from typing import Any, Callable, Optional, TypeVar, Union

from ._check import check_callable, check_optional_callable
from ._engine import Engine
from ._jobserver import Jobserver
from ._worker._batch import run_batch
from ._worker._initialize import Initializer

T = TypeVar("T")


class JobserverExecutor(Executor):
    """
    A drop-in for ``concurrent.futures.ProcessPoolExecutor``: one thread over a Jobserver.

    A worker that dies fails only its own future, with an exception that is a SubmissionDied and a
    ``concurrent.futures.process.BrokenProcessPool``; the executor goes on.

    Args:
        jobserver_or_max_workers: A Jobserver to use, and not to close; or how many calls may run
            at once, None for as many as this process may use CPUs.
        mp_context: The start method of the Jobserver that is made; not with a given one.
        initializer: Called in each worker before its first call. If it fails, the executor is
            broken.
        initargs: The arguments of the initializer.
        max_tasks_per_child: After how many calls a worker is replaced.

    Raises:
        TypeError, ValueError: A malformed argument.
    """

    def __init__(
        self,
        jobserver_or_max_workers: Union[int, Jobserver, None] = None,
        mp_context: Union[str, BaseContext, None] = None,
        initializer: Optional[Callable[..., Any]] = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: Optional[int] = None,
    ) -> None:
        check_optional_callable("initializer", initializer)
        _check_max_tasks(max_tasks_per_child)
        owns = not isinstance(jobserver_or_max_workers, Jobserver)
        if isinstance(jobserver_or_max_workers, Jobserver):
            if mp_context is not None:
                raise ValueError("mp_context is that of the Jobserver: do not give both")
            jobserver = jobserver_or_max_workers
        else:
            count = jobserver_or_max_workers
            if isinstance(count, int) and count <= 0:
                raise ValueError("max_workers must be greater than 0")
            jobserver = Jobserver(mp_context, count)
        first = None if initializer is None else Initializer(initializer, tuple(initargs))
        self._engine = Engine(jobserver, first, owns=owns)
        # Without a reference to the executor: dropping it lets the thread finish and end.
        self._finalizer = weakref.finalize(self, self._engine.stop)
        self._finalizer.atexit = False  # the engine has its own, earlier, hook

    @property
    def _broken(self) -> Union[bool, str]:
        return self._engine.broken or False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> StdFuture[T]:
        """
        Schedule ``fn(*args, **kwargs)``; the future is PENDING until a slot is taken for it.

        Raises:
            RuntimeError: After shutdown.
            concurrent.futures.process.BrokenProcessPool: The initializer has failed.
        """
        check_callable("fn", fn)
        return self._engine.submit(fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: Optional[float] = None,
        batchesize: int = 1,
        buffersize: Optional[int] = None,
    ) -> Iterator[T]:
        """
        Return an iterator like ``map(fn, *iterables)`` whose calls run in workers.

        Args:
            fn: What to call.
            iterables: As many as fn takes arguments; the shortest decides.
            timeout: Seconds from this call until the iterator raises TimeoutError.
            batchesize: So many calls go to one worker together.
            buffersize: None to read the inputs now; else the number of submissions that may be
                outstanding, and inputs are read only as needed.

        Raises:
            TypeError, ValueError: A malformed argument.
        """
        if batchesize < 1:
            raise ValueError("batchesize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else timeout + time.monotonic()
        calls = zip(*iterables)
        batches = iter(lambda: tuple(itertools.islice(calls, batchesize)), ())
        first = batches if buffersize is None else itertools.islice(batches, buffersize)
        futures = deque(self._engine.submit(run_batch, (fn, batch), {}) for batch in first)
        return _results(futures, weakref.ref(self), fn, batches, end)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        Take no more work.

        Args:
            wait: Return only when all work is done and all workers are gone.
            cancel_futures: Cancel what is pending.
        """
        self._engine.stop(cancel=cancel_futures)
        if wait:
            self._engine.join()

    def terminate_workers(self) -> None:
        """Send SIGTERM to all workers, and shut down without waiting; cancels what is pending."""
        self._stop_workers(signal.SIGTERM)

    def kill_workers(self) -> None:
        """Send SIGKILL to all workers, and shut down without waiting; cancels what is pending."""
        self._stop_workers(signal.SIGKILL)

    def _stop_workers(self, number: int) -> None:
        self._engine.stop(cancel=True)
        self._engine.signal_workers(number)

    def __repr__(self) -> str:
        engine = self._engine
        state = "broken" if engine.broken else "shutdown" if engine.stopping else "active"
        pending, running = engine.counts()
        return (
            f"JobserverExecutor({state}, pending={pending}, running={running},"
            f" jobserver={engine.jobserver!r})"
        )


def _check_max_tasks(count: Optional[int]) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if count <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")


def _results(
    futures: deque[StdFuture[list[T]]],
    executor: weakref.ref[JobserverExecutor],
    fn: Callable[..., T],
    batches: Iterator[tuple[tuple[Any, ...], ...]],
    end: Optional[float],
) -> Iterator[T]:
    try:
        while futures:
            # Before the head is waited for, so that the window is full meanwhile.
            alive = executor()
            batch = next(batches, None) if alive is not None else None
            if alive is not None and batch is not None:
                futures.append(alive._engine.submit(run_batch, (fn, batch), {}))
            del alive, batch
            head = futures.popleft()
            try:
                values = head.result(None if end is None else end - time.monotonic())
            finally:
                head.cancel()
                del head  # which refers to what is yielded
            values.reverse()
            while values:
                yield values.pop()
    finally:
        for future in futures:
            future.cancel()
