# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Put JobserverExecutor where CPython's tests look for ProcessPoolExecutor.

The tests look at some private parts of the pool.  Those that have a counterpart are shown under
the standard library's names, so that what the tests mean is tested; the others are not there, and
the tests that need them are among the differences.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import os
import signal
import threading
import time
import weakref
from typing import Any, Callable

from jobserver import JobserverExecutor
from jobserver._outcome import RemoteTraceback


class Worker:
    """A worker, with as much of multiprocessing.Process as the tests use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._pidfd)

    def terminate(self) -> None:
        """Send SIGTERM."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def join(self) -> None:
        """Wait until the process is gone, which somebody else reaps."""
        end = time.monotonic() + 30
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                signal.pidfd_send_signal(self._pidfd, 0)
                time.sleep(0.01)
            raise TimeoutError(f"worker {self.pid} did not end")


class ProcessPoolExecutor(JobserverExecutor):
    """JobserverExecutor with the private parts that CPython's tests look at."""

    def __init__(self, max_workers: int | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__(max_workers, *args, **kwargs)
        self._mp_context = self._engine.jobserver.context
        self._max_workers = self._engine.jobserver._shared.slots.slots
        self._futures: weakref.WeakSet[Any] = weakref.WeakSet()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Note the future, whose worker the tests may look for."""
        future = super().submit(fn, *args, **kwargs)
        self._futures.add(future)
        return future

    @property
    def _broken(self) -> str | bool:
        return self._engine.broken or False

    @property
    def _executor_manager_thread(self) -> threading.Thread | None:
        return self._engine._thread

    @property
    def _queue_management_thread(self) -> threading.Thread | None:
        return self._engine._thread

    @property
    def _call_queue(self) -> Any:
        """The queue whose thread the tests join: there is none here."""

        class NoQueue:
            def join_thread(self) -> None:
                """There is no such thread."""

        return NoQueue()

    @property
    def _processes(self) -> dict[int, Worker]:
        """The workers, once the thread has started all that it can.

        The standard library starts them inside submit.
        """
        engine = self._engine
        end = time.monotonic() + 30
        while time.monotonic() < end:
            unfinished = sum(not future.done() for future in self._futures)
            if engine.counts()[1] == min(unfinished, self._max_workers):
                break
            time.sleep(0.01)
        found = {}
        reactor = engine._shared.reactor
        with reactor.lock:
            running = [reactor.running.get(job) for job in engine._runs.jobs]
            for flight in [*running, *reactor.crew._resting]:
                if flight is not None:
                    with contextlib.suppress(ProcessLookupError):
                        found[flight.pid] = Worker(flight.pid)
        return found


def install() -> None:
    """From now on concurrent.futures has our executor in place of its own."""
    concurrent.futures.ProcessPoolExecutor = ProcessPoolExecutor  # type: ignore[assignment,misc]
    process: Any = concurrent.futures.process
    process.ProcessPoolExecutor = ProcessPoolExecutor
    # The cause of an exception that comes from a worker shows the worker's traceback.
    process._RemoteTraceback = RemoteTraceback
    traceback: Any = RemoteTraceback
    traceback.tb = property(lambda self: self.text)
