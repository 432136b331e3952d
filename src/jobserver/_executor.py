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
from typing import Any, Callable, Literal, Optional, TypeVar, Union

from ._backlog import Call
from ._batches import Batches
from ._check import check_callable, check_optional_callable
from ._engine import Engine
from ._executor_map import ExecutorMap
from ._inputs import Inputs
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
        max_workers: The same as a count for ``jobserver_or_max_workers``, by the name that the
            standard library has for it.
        max_tasks_per_child: After how many calls a worker is replaced, at the latest. As in the
            standard library it makes ``"spawn"`` the default, and does not go with ``"fork"``
            (unless a Jobserver is given).

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
        max_workers: Optional[int] = None,
        max_tasks_per_child: Optional[int] = None,
    ) -> None:
        check_optional_callable("initializer", initializer)
        _check_max_tasks(max_tasks_per_child)
        given = jobserver_or_max_workers
        if max_workers is not None:
            if given is not None:
                raise TypeError("give max_workers once, or a Jobserver, not both")
            given = max_workers
        owns = not isinstance(given, Jobserver)
        if not isinstance(given, Jobserver):
            given = _own_jobserver(given, mp_context, max_tasks_per_child)
        elif mp_context is not None:
            raise ValueError("mp_context is that of the Jobserver: do not give both")
        first = None if initializer is None else Initializer(initializer, tuple(initargs))
        self._engine = Engine(given, first, owns=owns)
        # Without a reference to the executor: dropping it lets the thread finish and end.
        self._finalizer = weakref.finalize(self, self._engine.stop)
        self._finalizer.atexit = False  # the engine has its own, earlier, hook

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> StdFuture[T]:
        """
        Schedule ``fn(*args, **kwargs)``; the future is PENDING until a slot is taken for it.

        Raises:
            RuntimeError: After shutdown.
            concurrent.futures.process.BrokenProcessPool: The initializer has failed.
        """
        check_callable("fn", fn)
        return self._engine.submit(Call(fn, args, kwargs))

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: Optional[float] = None,
        chunksize: Union[int, Literal["auto"]] = 1,
        buffersize: Optional[int] = None,
    ) -> Iterator[T]:
        """
        Return an iterator like ``map(fn, *iterables)`` whose calls run in workers.

        Args:
            fn: What to call.
            iterables: As many as fn takes arguments; the shortest decides.
            timeout: Seconds from this call until the iterator raises TimeoutError.
            chunksize: So many calls go to one worker together; or "auto" for batches that follow
                from how long the calls take, with the results of single calls.
            buffersize: None to read the inputs now; else the number of submissions (calls, with
                "auto") that may be outstanding, and inputs are read only as needed.

        Raises:
            TypeError, ValueError: A malformed argument.
        """
        if chunksize != "auto" and chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else timeout + time.monotonic()
        calls = zip(*iterables)
        if chunksize == "auto":
            return self._map_auto(fn, calls, buffersize, end)
        batches = iter(lambda: tuple(itertools.islice(calls, chunksize)), ())
        first = batches if buffersize is None else itertools.islice(batches, buffersize)
        futures = deque(self.submit(run_batch, fn, batch) for batch in first)
        return _cancelling(futures, _results(futures, weakref.ref(self), fn, batches, end))

    def _map_auto(
        self,
        fn: Callable[..., T],
        calls: Iterable[tuple[Any, ...]],
        buffersize: Optional[int],
        end: Optional[float],
    ) -> Iterator[T]:
        engine, alive, lazy = self._engine, weakref.ref(self), buffersize is not None
        bare = engine.jobserver._preexec_fn is None
        batches = Batches(fn, Inputs(calls, None, lazy=lazy), None, buffersize, bare=bare)
        run = ExecutorMap(engine, batches, (lambda: alive() is not None) if lazy else None)
        run.feed(read=True)
        return run.results(end)

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
        self._engine.stop(cancel=True, start=False)
        self._engine.signal_workers(number)

    def __repr__(self) -> str:
        engine = self._engine
        state = "broken" if engine.broken else "shutdown" if engine.stopping else "active"
        pending, running = engine.counts()
        return (
            f"JobserverExecutor({state}, pending={pending}, running={running},"
            f" jobserver={engine.jobserver!r})"
        )


def _own_jobserver(
    count: Optional[int], context: Union[str, BaseContext, None], max_tasks: Optional[int]
) -> Jobserver:
    """Make the Jobserver that a process pool of the standard library stands for."""
    if isinstance(count, bool) or not isinstance(count, (int, type(None))):
        raise TypeError(f"max_workers must be an int or None, not {type(count).__name__}")
    if count is not None and count <= 0:
        raise ValueError("max_workers must be greater than 0")
    if max_tasks is not None and context is None:
        context = "spawn"
    jobserver = Jobserver(context, count, max_tasks_per_child=max_tasks)
    if max_tasks is not None and jobserver.context.get_start_method() == "fork":
        raise ValueError(
            "max_tasks_per_child is incompatible with the 'fork' start method;"
            " supply a different mp_context"
        )
    return jobserver


def _check_max_tasks(count: Optional[int]) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError("max_tasks_per_child must be an integer")
    if count <= 0:
        raise ValueError("max_tasks_per_child must be >= 1")


def _cancelling(futures: deque[StdFuture[list[T]]], values: Iterator[T]) -> Iterator[T]:
    # Around the loops that make the values, not in their function, as `_map.ending` says.
    try:
        yield from values
    finally:
        for future in futures:
            future.cancel()


def _results(
    futures: deque[StdFuture[list[T]]],
    executor: weakref.ref[JobserverExecutor],
    fn: Callable[..., T],
    batches: Iterator[tuple[tuple[Any, ...], ...]],
    end: Optional[float],
) -> Iterator[T]:
    while futures:
        # Before the head is waited for, so that the window is full meanwhile.
        alive = executor()
        batch = next(batches, None) if alive is not None else None
        if alive is not None and batch is not None:
            futures.append(alive.submit(run_batch, fn, batch))
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
