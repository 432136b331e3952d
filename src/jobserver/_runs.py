# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What of an executor or a map runs: single calls, and drains that make many; see ``_calls``.

For the executor's thread alone, or that of a map; but for ``forget``, ``recall``, ``look_up``,
``send``, ``counts``, and what starts a call at once. No code of the user runs under a lock.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from functools import partial
from signal import SIGKILL
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from ._backlog import Backlog, Call
from ._calls import Calls, Drain
from ._future import Future
from ._launch._prep import watched
from ._outcome import value_of
from ._packing import PORTION, Packing, is_plain
from ._patience import Patience
from ._pledge import Pledge, Terms
from ._signals import deferred, lifted
from ._slots._lease import Lease
from ._slots._own import own_slot
from ._worker._initialize import Initializer, InitializerFailed
from ._worker._queue import drain
from ._worker._task import Task

if TYPE_CHECKING:
    from ._jobserver import Jobserver

# It takes so many that wait: each is told sooner if it is handed over by itself.
_LEAST = 16
# How long to do without the queue when a drain could not be started, or has died, in seconds.
_WITHOUT = 1.0


class Runs:
    """The jobs of one executor that are in flight."""

    def __init__(
        self,
        jobserver: Jobserver,
        initializer: Optional[Initializer],
        backlog: Backlog,
        patience: Patience,
        terms: Terms,
    ) -> None:
        self._jobserver = jobserver
        self._shared = jobserver._shared
        self._crew = jobserver._shared.reactor.crew
        self._initializer = initializer
        self._backlog = backlog
        self._patience = patience
        self._terms = terms
        self._packing = Packing(
            backlog, forks=self._shared.method == "fork", interruptible=terms.interruptible
        )
        # Guarded by the lock of the reactor; None for a promise that is already broken.
        self.jobs: dict[Future[Any], Union[Pledge, Drain, None]] = {}
        self.sink: deque[Future[Any]] = deque()
        self.signal: Optional[int] = None  # to be sent to whatever is started
        self.calls: Optional[Calls] = None
        self._error: Optional[Callable[[], BaseException]] = None  # of the executor, if broken
        with deferred(), self._shared.reactor.lock:
            # A job has a slot of its own to think of, and to lend.
            in_job = own_slot().attach(self._shared.slots)
        self._queues = self._shared.tasks is None and jobserver._is_plain() and not in_job
        self._without = 0.0
        # Calls that the threads which have submitted them are just starting; and jobs of theirs
        # that were over before they had been noted.
        self._at_once = 0
        self._early: set[Future[Any]] = set()

    def __len__(self) -> int:
        """Return how many jobs are in flight, and calls between the backlog and their end."""
        calls = 0 if self.calls is None else len(self.calls)
        return len(self.jobs) + calls + self._at_once

    # The queue

    def fill(self) -> None:
        """Put calls from the backlog into the queue, if that is worth it."""
        if not self._queues or time.monotonic() < self._without:
            return
        waiting = 0 if self.calls is None else self.calls.waiting()
        if not waiting and len(self._backlog) < max(_LEAST, 2 * self._shared.slots.slots):
            return
        calls = self._open() if self.calls is None else self.calls
        if calls is None or waiting > calls.room - PORTION:
            return
        now = watched()
        if calls.drains and now is not calls.surroundings:
            return  # those who drain would not know what has changed
        calls.surroundings = now
        if not len(calls):
            calls.youth = -1
        with lifted():  # pickling runs code of the user's
            portion = self._packing.portion(calls)
        with suppress(OSError), deferred():
            calls.add(portion)

    def _open(self) -> Optional[Calls]:
        with suppress(OSError), deferred():
            self.calls = Calls(self._backlog)
        return self.calls

    def recall(self) -> None:
        """Put the calls that nobody has claimed back into the backlog."""
        if self.calls is not None:
            with deferred():
                self.calls.recall()

    def forget(self, promise: Pledge) -> bool:
        """Take out a call that is pending; False if it is not, or cannot be had just now."""
        with deferred(), self._backlog.lock:
            if promise.number and self.calls is not None:
                self.calls.recall()
            return self._backlog.remove(promise)

    def look_up(self) -> None:
        """Let the promises of calls that drains are at be running."""
        if self.calls is not None:
            with deferred():
                promises = self.calls.begun()
            for promise in promises:
                promise.begin()

    def counts(self) -> tuple[int, int]:
        """Return how many calls are pending and running."""
        calls = self.calls
        if calls is None:
            return len(self._backlog), len(self.jobs)
        alone = max(0, len(self.jobs) - len(calls.drains))
        waiting = calls.waiting()
        return len(self._backlog) + waiting, alone + max(0, len(calls) - waiting)

    # Starting

    def wanted(self) -> bool:
        """Say whether there is something to do for one more slot."""
        calls = self.calls
        if calls is not None and calls.waiting():
            return calls.wants_drain()
        return bool(self._backlog)

    def start(self, lease: Lease) -> None:
        """Start a drain, or the next call, on ``lease``."""
        calls = self.calls
        if calls is not None and calls.waiting():
            self._start_drain(lease, calls)
        else:
            self._start_call(lease)

    def _start_call(self, lease: Lease) -> None:
        found = self._backlog.take()
        if found is None:
            self._give_back(lease)
            return
        promise, call = found
        try:
            with call.handed_over():
                job = self._launch(lease, *call[:3])
        except BaseException as error:
            if self._comes_through(error):
                raise
            promise.resolve(None, self._terms.of_start(error))
            return
        with deferred(), self._shared.reactor.lock:
            self.jobs[job] = promise
            promise.job = job
            self._patience.started(promise)
        self._greet(job)

    def begin_at_once(self, call: Call) -> bool:
        """
        Say whether the thread that submits a call should start it; under the lock of the backlog.

        That spares waking this executor's thread. But a thread of the user's is to start no process
        and to wait for nothing, so it is for what is sent in no time to a worker at rest.
        """
        if self._backlog or not self._queues or self._initializer is not None or not self._crew:
            return False
        if self.calls is not None and len(self.calls):
            return False
        if call.ledger is not None or not is_plain(call):
            return False
        self._at_once += 1
        return True

    def start_at_once(self, promise: Pledge, call: Call) -> bool:
        """
        Start a call, or put it into the backlog; for the thread that submits it.

        Returns:
            False if the executor's thread has something to do.
        """
        reactor = self._shared.reactor
        job: Optional[Future[Any]] = None
        early = False
        try:
            lease = None
            with suppress(OSError), reactor.lock:
                lease = self._crew.try_take()
            if lease is None or lease.worker is None:
                if lease is not None:
                    self._give_back(lease)
                with self._backlog.lock:
                    self._backlog.add(promise, call)
                return False
            promise.told()
            try:
                job = self._launch(lease, *call[:3])
            except Exception as error:  # noqa: BLE001
                promise.resolve(None, self._terms.of_start(error))
                return False
        finally:
            with reactor.lock:
                self._at_once -= 1
                if job is not None:
                    early = job in self._early
                    self._early.discard(job)
                    self.jobs[job] = promise
                    promise.job = job
                    self._patience.started(promise)
        assert job is not None  # noqa: S101  # else this has been left
        if early:
            self.sink.append(job)
        self._greet(job)
        return not early

    def _start_drain(self, lease: Lease, calls: Calls) -> None:
        try:
            made = Drain()
        except OSError:
            self._give_back(lease)
            self._cannot_drain(calls)
            return
        worker = lease.worker
        forks = self._shared.method == "fork"
        if forks and worker is not None and worker.born <= calls.youth:
            self._shared.reactor.dismiss(lease)
        try:
            with calls.queue.handed_over(), made.ledger.handed_over():
                job = self._launch(lease, drain, (calls.queue, made.ledger), {})
        except BaseException as error:
            made.close()
            if self._comes_through(error):
                raise
            self._cannot_drain(calls)
            return
        with deferred(), self._shared.reactor.lock:
            flight = self._shared.reactor.running.get(job)
            made.born = 0 if flight is None else flight.born
            self.jobs[job] = made
            calls.drains[job] = made
        self._greet(job)

    def _comes_through(self, error: BaseException) -> bool:
        return self._terms.interruptible and not isinstance(error, Exception)

    def _cannot_drain(self, calls: Calls) -> None:
        """Have each call be told for itself what is in the way."""
        self._without = time.monotonic() + _WITHOUT
        calls.recall()

    def _launch(
        self, lease: Lease, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Future[Any]:
        js = self._jobserver
        task = Task(fn, args, kwargs, *js._worker_side(None, None), self._initializer)
        with deferred():
            return self._shared.start(task, [lease], lends=js._lend, sink=self.sink)

    def _give_back(self, lease: Lease) -> None:
        self._shared.admission.give_back(lease, unheard=True)

    def _greet(self, job: Future[Any]) -> None:
        if self.signal is not None:
            job._send(self.signal)

    def send(self, number: int) -> None:
        """Send a signal to each worker, also to one that is about to start; for any thread."""
        self.signal = number
        with deferred(), self._shared.reactor.lock:
            jobs = list(self.jobs)
        for job in jobs:
            job._send(number)

    # Ending

    def complete(self, job: Future[Any]) -> Optional[InitializerFailed]:
        """Resolve what a job that is over has made; returns how the initializer has failed."""
        with deferred(), self._shared.reactor.lock:
            if job not in self.jobs:
                self._early.add(job)  # another thread has started it, and is about to note that
                return None
            run = self.jobs.pop(job)
            promise = None if isinstance(run, Drain) else run
            if promise is not None:
                self._patience.ended(promise)
        outcome = job._outcome
        assert outcome is not None  # noqa: S101  # that is what being in the sink means
        if run is None:  # its promise was broken
            return None
        if isinstance(run, Drain) and self.calls is not None:
            with deferred():
                results = self.calls.results(run, ended=True)
                promise = self.calls.ended(job, well=outcome.well)
            self._resolve(results)
            if not outcome.well and promise is None and not run.done:
                self._cannot_drain(self.calls)  # else the next one might die just so, for ever
        if promise is not None and self._terms.put_off(promise, outcome.get):
            return None
        value: Any = None
        failure: Optional[BaseException] = None
        if promise is not None or self._initializer is not None:
            try:
                value = outcome.get()
            except BaseException as error:  # noqa: BLE001
                # The traceback leads to this frame, and that to what refers to the error.
                error.__traceback__ = None
                failure = error
        if promise is not None:
            promise.resolve(value, self._told(failure, died=outcome.died))
        return failure if isinstance(failure, InitializerFailed) else None

    def _told(self, failure: Optional[BaseException], *, died: bool) -> Optional[BaseException]:
        if failure is None:
            return None
        if self._error is not None:
            return self._error()
        if isinstance(failure, InitializerFailed):
            return self._terms.broken_by(failure)
        return self._terms.of_end(failure, died=died)

    def look(self) -> None:
        """See how far drains are that last; and whether calls are to be made by others."""
        calls = self.calls
        if calls is None:
            return
        now = time.monotonic()
        for each in list(calls.drains.values()):
            if now >= each.look_at:
                with deferred():
                    results = calls.results(each, ended=False)
                self._resolve(results)
                self.look_up()
        calls.settle_lost()
        if self._error is not None:
            self._backlog.fail_all(self._error())

    def next_look(self) -> Optional[float]:
        """Return when there is something to look at; None for never."""
        return None if self.calls is None else self.calls.next_look()

    def _resolve(self, results: list[tuple[Pledge, Any]]) -> None:
        put_off = self._terms.put_off
        for promise, record in results:
            if self._error is not None:
                promise.resolve(None, self._error())
            elif record is None:
                promise.resolve(None)
            elif not put_off(promise, partial(value_of, record)):
                try:
                    value = value_of(record)
                except BaseException as error:  # noqa: BLE001
                    error.__traceback__ = None
                    promise.resolve(None, self._terms.of_end(error, died=False))
                else:
                    promise.resolve(value)

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Kill all jobs, and fail all calls."""
        self._error = error
        self._queues = False
        self.recall()
        with deferred(), self._shared.reactor.lock:
            runs = list(self.jobs.items())
            for job, run in runs:
                if run is not None and not isinstance(run, Drain):
                    self.jobs[job] = None
                    self._patience.ended(run)
        for job, run in runs:
            job._send(SIGKILL)
            if run is not None and not isinstance(run, Drain):
                run.resolve(None, error())
        self._backlog.fail_all(error())

    def abandon(self) -> None:
        """Have nothing more begun; what runs runs on, and nobody asks what it will come to."""
        with deferred():
            self.recall()
            self._backlog.cut(0)
            for job, run in self.jobs.items():
                job._vain = isinstance(run, Drain) and run.is_fresh()
            if self.calls is not None:
                self.calls.abandon()
            self.close()

    def close(self) -> None:
        """Let go of the queue, in which nothing is left."""
        calls, self.calls = self.calls, None
        if calls is not None:
            calls.close()
