# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The one background thread of an executor, and what it works on.

Guarantees:

* The thread never refers to the executor itself, so an executor that is dropped is collected, and
  its thread ends when its work is done.
* A pending future can be cancelled until a slot has been taken for it.
* The thread issues no callbacks registered with ``Jobserver`` futures: those of a shared Jobserver
  belong to the threads of whoever registered them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future as StdFuture
from concurrent.futures.process import BrokenProcessPool
from signal import SIGKILL
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from . import _forking
from ._check import check_pause
from ._errors import SubmissionDied
from ._future import Future
from ._slots._lease import Lease
from ._worker._initialize import Initializer, InitializerFailed
from ._worker._task import Task

if TYPE_CHECKING:
    from ._jobserver import Jobserver

_TICK = 0.2
_LINGER = 5.0


class WorkerDied(SubmissionDied, BrokenProcessPool):
    """SubmissionDied as an executor raises it: can be caught as BrokenProcessPool, too."""


class _Work(NamedTuple):
    future: StdFuture[Any]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Engine:
    """Run submitted work on a Jobserver, in a thread that is started with the first of it."""

    def __init__(
        self, jobserver: Jobserver, initializer: Optional[Initializer], *, owns: bool
    ) -> None:
        self.jobserver = jobserver
        self.broken: Optional[str] = None
        self.stopping = False
        self._shared = jobserver._shared
        self._initializer = initializer
        self._owns = owns
        self._lock = threading.Lock()
        self._pending: deque[_Work] = deque()
        self._sink: deque[Future[Any]] = deque()
        self._running: dict[Future[Any], StdFuture[Any]] = {}
        self._lease: Optional[Lease] = None
        self._not_before = 0.0
        self._thread: Optional[threading.Thread] = None
        self._ended = False
        self._foreign = False
        _forking.track(self)

    def submit(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> StdFuture[Any]:
        """Queue a call."""
        with self._lock:
            if self.broken is not None:
                raise BrokenProcessPool(self.broken)
            if self.stopping or self._foreign:
                raise RuntimeError("cannot schedule new futures after shutdown")
            future: StdFuture[Any] = StdFuture()
            self._pending.append(_Work(future, fn, args, kwargs))
            if self._thread is None:
                self._start()
        self._shared.reactor.notify(self._sink)
        return future

    def _start(self) -> None:
        # Not a daemon: the interpreter's end waits for it, and has told it before (see `stop`).
        thread = threading.Thread(target=self._serve, name="JobserverExecutor")
        try:
            at_end: Any = threading
            at_end._register_atexit(self.stop)
        except RuntimeError:
            self._pending.pop()
            raise RuntimeError("cannot schedule new futures after interpreter shutdown") from None
        try:
            thread.start()
        except BaseException:
            self._pending.pop()
            raise
        self._thread = thread

    def stop(self, *, cancel: bool = False) -> None:
        """Take no more work; end once what is there is done, or now for what is pending."""
        with self._lock:
            self.stopping = True
            cancelled = list(self._pending) if cancel else []
            for work in cancelled:
                self._pending.remove(work)
            started = self._thread is not None
        for work in cancelled:
            # Cancelled and told so, as wait() and as_completed() expect of a dropped future.
            if work.future.cancel():
                work.future.set_running_or_notify_cancel()
        if started:
            self._shared.reactor.notify(self._sink)
        else:
            self._close()

    def join(self) -> None:
        """Wait for the thread to end; does nothing on that thread itself."""
        thread = self._thread
        if thread is not None and thread is not threading.current_thread() and not self._foreign:
            thread.join()

    def signal_workers(self, number: int) -> None:
        """Send a signal to each running worker."""
        for future in list(self._running):
            future._send(number)

    def counts(self) -> tuple[int, int]:
        """Return how many calls are pending and running."""
        return len(self._pending), len(self._running)

    def _serve(self) -> None:
        reactor = self._shared.reactor
        try:
            while not self._finished():
                seeks = bool(self._pending) and self._lease is None
                gated = seeks and self._not_before > time.monotonic()
                seeks = seeks and not gated
                reactor.wait(
                    self._test_seeking if seeks else self._test,
                    self._not_before if gated else None,
                    target=self._sink,
                    arm=reactor.slots.filenos() if seeks and not reactor.closed else (),
                    tick=_TICK if seeks else None,
                    on_tick=reactor.slots.sweep,
                )
                self._turn()
        except BaseException as error:  # noqa: BLE001  # else every future would wait for ever
            self._break(f"the executor's thread has failed: {error!r}", error)
        finally:
            self._close()

    def _turn(self) -> None:
        while self._sink:
            self._complete(self._sink.popleft())
        if self._lease is not None:
            lease, self._lease = self._lease, None
            self._launch(lease)

    def _test(self) -> bool:
        """Called under the reactor's lock: is there anything to do other than to launch?"""
        idle_end = self.stopping and not self._running and not self._pending
        gate_over = bool(self._pending) and self._not_before <= time.monotonic()
        return bool(self._sink) or idle_end or gate_over

    def _test_seeking(self) -> bool:
        if self._sink or not self._pending:
            return True
        if self._shared.closed:
            raise RuntimeError("Jobserver is closed")
        self._lease = self._shared.slots.try_take()
        return self._lease is not None

    def _finished(self) -> bool:
        return (self.stopping or self.broken is not None) and not (self._pending or self._running)

    def _admits(self) -> bool:
        sleep_fn = self.jobserver._sleep_fn
        pause = None if sleep_fn is None else check_pause(sleep_fn())
        if pause is None:
            return True
        self._not_before = time.monotonic() + min(pause, 86400.0)
        return False

    def _launch(self, lease: Lease) -> None:
        """Start the next call that is not cancelled on ``lease``."""
        admission = self._shared.admission
        try:
            admitted = bool(self._pending) and self._admits()
        except Exception as error:  # noqa: BLE001  # sleep_fn's own: told to the call it was asked for
            admission.give_back(lease)
            work = self._next()
            if work is not None:
                work.future.set_exception(error)
            return
        work = self._next() if admitted else None
        if work is None:
            admission.give_back(lease)
            return
        js = self.jobserver
        fn, args, kwargs = work.fn, work.args, work.kwargs
        if self._initializer is not None:
            fn, args, kwargs = self._initializer, (fn, args, kwargs), {}
        task = Task(fn, args, kwargs, js._env, js._preexec_fn)
        try:
            running = self._shared.start(task, lease, lends=js._lend, sink=self._sink)
        except Exception as error:  # noqa: BLE001
            work.future.set_exception(error)
            return
        self._running[running] = work.future

    def _next(self) -> Optional[_Work]:
        while True:
            with self._lock:
                if not self._pending:
                    return None
                work = self._pending.popleft()
            if work.future.set_running_or_notify_cancel():
                return work

    def _complete(self, done: Future[Any]) -> None:
        # A very short job may be in the sink before `start` has returned; that is this thread, so
        # it is in `_running` by the time the sink is looked at.
        future = self._running.pop(done)
        outcome = done._outcome
        assert outcome is not None  # noqa: S101  # that is what being in the sink means
        try:
            value = outcome.get()
        except InitializerFailed as error:
            failure = BrokenProcessPool("an initializer has failed: the executor is broken")
            failure.__cause__ = error.__cause__
            future.set_exception(failure)
            self._break(str(failure), error)
        except SubmissionDied as death:
            raised = death
            if type(death) is SubmissionDied and done._died():
                raised = WorkerDied(death.exitcode, death.detail)
                raised.__cause__ = death.__cause__
            future.set_exception(raised)
        except BaseException as error:  # noqa: BLE001
            future.set_exception(error)
        else:
            future.set_result(value)

    def _break(self, why: str, error: BaseException) -> None:
        with self._lock:
            self.broken = why
            left = [work.future for work in self._pending]
            self._pending.clear()
        running = list(self._running.items())
        self._running.clear()
        for job, future in running:
            job._sink = None
            job._send(SIGKILL)
            left.append(future)
        for future in left:
            failure = BrokenProcessPool(why)
            failure.__cause__ = error
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(failure)

    def _close(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self._owns:
            self._shared.reactor.reap_lingering(_LINGER)
            self._shared.reactor.close()

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """The thread is the parent's."""
        self._lock = threading.Lock()
        self._foreign = True
        self._thread = None
        self._ended = True
