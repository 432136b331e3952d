# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What the tests of JobserverExecutor share: jobs that use executors, and threads that use one."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import threading
import time
from concurrent.futures import Future as StdFuture
from concurrent.futures import TimeoutError as LateError
from concurrent.futures import as_completed
from typing import TYPE_CHECKING, Any, Callable

from helpers import PATIENCE, append, identity, wait_until

from jobserver import Jobserver, JobserverExecutor

if TYPE_CHECKING:
    from helpers import Gate
    from nesting_jobs import Account


# In the test's own process


def in_threads(*functions: Callable[[], object]) -> list[Any]:
    """Run functions side by side, started together; their results or their exceptions."""
    outcome: list[Any] = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(number: int, function: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE)
            outcome[number] = function()
        except BaseException as error:
            outcome[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return outcome


def executor_threads() -> list[threading.Thread]:
    """The background threads of all executors."""
    return [thread for thread in threading.enumerate() if thread.name == "JobserverExecutor"]


def _taken(future: StdFuture[Any]) -> bool:
    return not _pending(future)


def await_running(*futures: StdFuture[Any]) -> None:
    """Wait until a slot has been taken for each."""
    for future in futures:
        wait_until(functools.partial(_taken, future), "a slot to be taken")


def _pending(future: StdFuture[Any]) -> bool:
    return not (future.running() or future.done())


class Recorder:
    """A callback that notes what it is called with, and by which thread."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls: list[Any] = []
        self.threads: list[str] = []
        self.error = error

    def __call__(self, what: Any) -> None:
        self.calls.append(what)
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error


# Plain jobs


def pid_of(_number: int) -> int:
    """Which process works on this input."""
    return os.getpid()


def note_and_return(path: str, value: int, padding: bytes = b"") -> int:
    """Leave a line, so that it can be told which inputs were worked on."""
    append(path, str(value))
    return value


def note_and_hold(gate: Gate, path: str, value: int) -> int:
    """Leave a line and, but for the first, stand at the gate."""
    append(path, str(value))
    if value:
        gate.enter()
    return value


def push(values: list[int], value: int) -> list[int]:
    """Return a list that has been added to."""
    values.append(value)
    return values


def set_variable(name: str, value: str) -> None:
    """Set a variable that nobody else has set."""
    if name in os.environ:
        raise KeyError(name)
    os.environ[name] = value


def leave_thread(path: str, value: int) -> int:
    """Return while a thread of this process has still something to write."""

    def write() -> None:
        returned.wait()
        append(path, f"{value} {os.getpid()}")

    returned = threading.Event()
    threading.Thread(target=write).start()
    threading.Timer(0.01, returned.set).start()
    return os.getpid()


def hold(gate: Gate, value: Any) -> Any:
    """Stand at the gate with something in the hands."""
    gate.enter()
    return value


class Weighty:
    """Something whose end can be seen."""


def make_weighty(_number: int) -> Weighty:
    """A new object."""
    return Weighty()


class CannotBePickled(Exception):
    """An exception that holds what cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("no way", threading.Lock())


def raise_unpicklable() -> None:
    """Fail in a way that cannot be told."""
    raise CannotBePickled


def raise_cancelled() -> None:
    """Raise a BaseException that is neither SystemExit nor KeyboardInterrupt."""
    raise asyncio.CancelledError("from the job")


def raise_interrupt() -> None:
    """As if Ctrl-C had reached the job."""
    raise KeyboardInterrupt


def make_lock() -> Any:
    """A result that cannot be pickled."""
    return threading.Lock()


# Initializers

_status: list[str] = []


def initialize(status: str) -> None:
    """Set what `initialized` says."""
    _status.append(status)


def initialized() -> list[str]:
    """What the initializer has set, each time."""
    return _status


def fail_to_initialize(path: str, gate: Gate | None = None) -> None:
    """Note the attempt, and have the log noted, then fail, as soon as the gate is open."""
    append(path, str(os.getpid()))
    if gate is not None:
        gate.enter()
    logging.getLogger("concurrent.futures").addHandler(logging.FileHandler(path + ".log"))
    raise LookupError("nothing to start from")


def initialize_if_missing(path: str) -> None:
    """Succeed once; fail from the second time on."""
    if os.path.exists(path):
        raise LookupError("second time")
    append(path, "first time")


# Executors inside jobs: the job may hold the only slot


def sum_by_submit(js: Jobserver, count: int) -> int:
    """Wait for one call after the other, without leaving time to anybody."""
    with JobserverExecutor(js) as executor:
        return sum(executor.submit(identity, number).result() for number in range(count))


def sum_by_map(js: Jobserver, count: int) -> int:
    """Have all calls pending before waiting for the first."""
    with JobserverExecutor(js) as executor:
        return sum(executor.map(identity, range(count)))


def shut_down_with_pending(js: Jobserver, path: str, count: int) -> int:
    """Wait in shutdown alone."""
    executor = JobserverExecutor(js)
    futures = [executor.submit(note_and_return, path, number) for number in range(count)]
    executor.shutdown(wait=True)
    return sum(future.result(timeout=0) for future in futures)


def leave_pending(js: Jobserver, path: str, count: int) -> str:
    """Return with calls pending, and nobody who waits for them."""
    executor = JobserverExecutor(js)
    for number in range(count):
        executor.submit(note_and_return, path, number)
    return "left"


def exception_of_nested(js: Jobserver) -> str:
    """Wait by exception()."""
    with JobserverExecutor(js) as executor:
        return repr(executor.submit(divmod, 1, 0).exception())


def nested_deaths(js: Jobserver) -> list[str]:
    """Calls that die on the job's own slot, one after the other."""
    with JobserverExecutor(js) as executor:
        errors = [executor.submit(os._exit, 7).exception() for _ in range(3)]
        errors.append(executor.submit(identity, 1).exception())
    return [type(error).__name__ for error in errors]


def nested_with_timeout(js: Jobserver) -> list[Any]:
    """Wait with a timeout first, without one then."""
    with JobserverExecutor(js) as executor:
        future = executor.submit(identity, 5)
        try:
            future.result(timeout=0.3)
            said = "in time"
        except (LateError, TimeoutError):
            said = "late"
        return [said, future.result()]


def from_two_threads(js: Jobserver, count: int) -> list[int]:
    """Two threads of one job wait, each for calls of its own."""
    with JobserverExecutor(js) as executor:

        def work() -> int:
            return sum(executor.submit(identity, number).result() for number in range(count))

        return in_threads(work, work)


def two_executors(js: Jobserver) -> list[int]:
    """Wait for one executor while the other has calls pending."""
    with JobserverExecutor(js) as first, JobserverExecutor(js) as second:
        futures = [ex.submit(identity, n) for n in range(3) for ex in (first, second)]
        return [future.result() for future in futures]


def deeper(js: Jobserver, depth: int) -> int:
    """An executor inside a job of an executor inside a job..."""
    if not depth:
        return 0
    with JobserverExecutor(js) as executor:
        return 1 + executor.submit(deeper, js, depth - 1).result()


def accounted_tree(js: Jobserver, account: Account, width: int, depth: int) -> int:
    """Fan out by executors; says when it surely runs."""
    name = f"{os.getpid()}.{depth}"
    with account.running(name):
        if not depth:
            time.sleep(0.01)
            return 1
        executor = JobserverExecutor(js)
        futures = [
            executor.submit(accounted_tree, js, account, width, depth - 1) for _ in range(width)
        ]
        total = 0
        for future in futures:
            with account.away(name):
                count = future.result()
            total += count
        with account.away(name):
            executor.shutdown()
        return total + 1


def without_slot(js: Jobserver, count: int) -> int:
    """For a job that consumes no slot: only those above it have one to give."""
    return sum_by_map(js, count)


def around_without_slot(js: Jobserver, count: int) -> int:
    """Wait, with a slot, for a job without one that needs one."""
    return js.submit(without_slot, args=(js, count), consume=0).result()


def hold_while_waiting(js: Jobserver, gate: Gate) -> int:
    """Wait for a call that stands at the gate."""
    with JobserverExecutor(js) as executor:
        return executor.submit(gate.enter).result()


def use_inherited(executor: JobserverExecutor, future: StdFuture[Any]) -> list[str]:
    """Under fork: what an executor and a future of the parent say here."""
    said = []
    for attempt in (lambda: executor.submit(identity, 1), future.result, future.exception):
        try:
            attempt()
            said.append("worked")
        except RuntimeError as error:
            said.append(str(error))
    future.cancel()
    executor.shutdown(wait=True, cancel_futures=True)
    executor.kill_workers()
    return said


def fresh_executor(js: Jobserver) -> list[int]:
    """An executor made in a worker that was forked from a process with executors."""
    gc.collect()
    with JobserverExecutor(js) as executor:
        futures = [executor.submit(identity, number) for number in range(3)]
        return [future.result() for future in futures]


def completed_order(js: Jobserver) -> list[int]:
    """as_completed inside a job that leaves a slot free."""
    with JobserverExecutor(js) as executor:
        futures = [executor.submit(identity, number) for number in range(3)]
        return sorted(future.result() for future in as_completed(futures))


_notes: list[str] = []


def note_once(what: str) -> None:
    """An initializer: leave a note in this process."""
    _notes.append(what)


def noted() -> tuple[int, list[str]]:
    """Which process this is, and what was noted in it."""
    return os.getpid(), _notes
