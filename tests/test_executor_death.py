# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What goes wrong in an executor's call is told to its future alone; initializers; transfers."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Callable

import pytest
from executor_jobs import (
    await_running,
    fail_to_initialize,
    initialize,
    initialize_if_missing,
    initialized,
    make_lock,
    raise_cancelled,
    raise_interrupt,
    raise_unpicklable,
)
from helpers import (
    PATIENCE,
    Gate,
    chain_text,
    die,
    hard_exit,
    identity,
    lines,
    soft_exit,
    wait_until,
)
from jobs import divide_deeply, fail_from_cause
from jobs_ending import exec_program
from jobs_results import (
    ExitsWhenUnpickled,
    RaisesWhenPickled,
    RaisesWhenUnpickled,
    SoftExitWhenUnpickled,
)

from jobserver import Jobserver, JobserverExecutor, SubmissionDied

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])
remote = pytest.mark.parametrize("method", ["spawn", "forkserver"])

DEATHS: list[tuple[Callable[..., Any], Any, int]] = [
    (die, signal.SIGKILL, -signal.SIGKILL),
    (die, signal.SIGSEGV, -signal.SIGSEGV),
    (hard_exit, 0, 0),
    (hard_exit, 5, 5),
    (exec_program, ["/bin/sh", "-c", "exit 4"], 4),
]


@pytest.mark.contract("E6")
@pytest.mark.parametrize(("how", "argument", "exitcode"), DEATHS)
@swift
def test_death(how: Any, argument: Any, exitcode: int, method: str) -> None:
    """A worker's death is a SubmissionDied that can be caught as BrokenProcessPool."""
    with JobserverExecutor(1, method) as executor:
        future = executor.submit(how, argument)
        error = future.exception(PATIENCE)

        assert isinstance(error, SubmissionDied)
        assert isinstance(error, BrokenProcessPool)
        assert isinstance(error, BrokenExecutor)
        assert error.exitcode == exitcode
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E6")
def test_death_hurts_nobody_else(method: str, gate: Gate) -> None:
    """Calls that run beside a worker that dies, and those behind it, get their results."""
    with JobserverExecutor(2, method) as executor:
        beside = executor.submit(gate.enter)
        gate.await_entered(1)
        dying = [executor.submit(die, signal.SIGKILL) for _ in range(2)]
        behind = executor.submit(identity, 1)
        for future in dying:
            with pytest.raises(BrokenProcessPool):
                future.result(PATIENCE)

        assert behind.result(PATIENCE) == 1
        gate.open()
        assert beside.result(PATIENCE) == gate.entered()[0]
        assert list(executor.map(identity, range(3))) == [0, 1, 2]


@pytest.mark.contract("E6", "E5")
@swift
def test_sys_exit(method: str) -> None:
    """sys.exit in a call is the standard library's SystemExit and our SubmissionDied."""
    with JobserverExecutor(1, method) as executor:
        for status, exitcode in ((3, 3), (None, 0), ("text", 1)):
            error = executor.submit(soft_exit, status).exception(PATIENCE)
            assert isinstance(error, SystemExit)
            assert isinstance(error, SubmissionDied)
            assert isinstance(error, BrokenProcessPool)
            assert (error.code, error.exitcode) == (status, exitcode)
            travelled = pickle.loads(pickle.dumps(error))
            assert (type(travelled), travelled.code) == (type(error), status)
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E6", "E5")
@swift
def test_other_base_exceptions(method: str) -> None:
    """KeyboardInterrupt and others like it come out as they do with the standard library."""
    with JobserverExecutor(1, method) as executor:
        error = executor.submit(raise_interrupt).exception(PATIENCE)
        assert isinstance(error, KeyboardInterrupt)
        assert isinstance(error, SubmissionDied)
        cancelled = executor.submit(raise_cancelled).exception(PATIENCE)
        assert type(cancelled) is asyncio.CancelledError
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E6")
def test_death_that_is_passed_on() -> None:
    """A SubmissionDied that a job raises is an exception as any other, not this worker's death."""
    with JobserverExecutor(1, "fork") as executor:
        error = executor.submit(_raise, SubmissionDied(9, "elsewhere")).exception(PATIENCE)
        assert type(error) is SubmissionDied
        assert error.exitcode == 9


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.contract("E5")
def test_exception_with_the_workers_traceback(method: str) -> None:
    """What fn raises is raised here, caused by the traceback of the worker."""
    with JobserverExecutor(2, method) as executor:
        deep = executor.submit(divide_deeply, 2)
        with pytest.raises(ZeroDivisionError) as caught:
            deep.result(PATIENCE)
        assert chain_text(caught.value).count("in divide_deeply") == 3
        caused = executor.submit(fail_from_cause).exception(PATIENCE)
        assert isinstance(caused, RuntimeError)
        assert "the cause" in chain_text(caused)


# What cannot travel


@pytest.mark.contract("E5")
@remote
def test_call_that_cannot_be_pickled(method: str) -> None:
    """What pickling raises is raised by the future, as in the standard library."""
    with JobserverExecutor(1, method) as executor:
        for argument, kind in ((RaisesWhenPickled(), ZeroDivisionError), (lambda: 1, None)):
            error = executor.submit(identity, argument).exception(PATIENCE)
            assert kind is None or type(error) is kind
            assert isinstance(error, (kind or Exception))
            assert not isinstance(error, SubmissionDied)
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E5")
@pytest.mark.parametrize("thing", [RaisesWhenUnpickled, SoftExitWhenUnpickled, ExitsWhenUnpickled])
@remote
def test_call_that_cannot_be_unpickled(thing: Any, method: str) -> None:
    """A call that cannot be unpickled in the worker is a BrokenProcessPool, for itself alone."""
    with JobserverExecutor(1, method) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(identity, thing()).result(PATIENCE)
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E5")
def test_result_that_cannot_be_pickled(method: str) -> None:
    """What pickling the result, or the exception, has raised in the worker is raised here."""
    with JobserverExecutor(1, method) as executor:
        for job in (make_lock, raise_unpicklable):
            with pytest.raises(TypeError, match="pickle") as caught:
                executor.submit(job).result(PATIENCE)
            assert "Traceback" in chain_text(caught.value)
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E5")
@pytest.mark.parametrize("kind", [RaisesWhenUnpickled, SoftExitWhenUnpickled])
@swift
def test_result_that_cannot_be_unpickled(kind: type, method: str) -> None:
    """A result that cannot be unpickled here is a BrokenProcessPool, for its own future alone."""
    with JobserverExecutor(1, method) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(kind).result(PATIENCE)
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E5")
def test_fork_needs_no_pickling_of_the_call() -> None:
    """Under fork lambdas and closures can be called, with any arguments."""
    number = 3
    with JobserverExecutor(1, "fork") as executor:
        assert executor.submit(lambda factor: number * factor, 2).result(PATIENCE) == 6


# Initializers


@pytest.mark.contract("E7", "E2")
def test_initializer(method: str) -> None:
    """Each worker is initialized, once, before its first call."""
    with JobserverExecutor(2, method, initialize, ("ready",)) as executor:
        found = [executor.submit(initialized) for _ in range(3)]
        assert [future.result(PATIENCE) for future in found] == [["ready"]] * 3
        assert list(executor.map(_status_for, range(2))) == [["ready"]] * 2


def _status_for(_number: int) -> list[str]:
    return initialized()


@pytest.mark.contract("E7")
def test_failing_initializer_breaks_the_executor(method: str, tmp_path: Path, gate: Gate) -> None:
    """All futures fail with BrokenProcessPool, then submit does; the failure is logged."""
    path = tmp_path / "log"
    with JobserverExecutor(1, method, fail_to_initialize, (str(path), gate)) as executor:
        futures = [executor.submit(identity, number) for number in range(3)]
        gate.open()
        for future in futures:
            with pytest.raises(BrokenProcessPool, match="initializer"):
                future.result(PATIENCE)
        with pytest.raises(BrokenProcessPool):
            executor.submit(identity, 1)
        with pytest.raises(BrokenProcessPool):
            executor.map(identity, [1])
        assert "broken" in repr(executor)
    assert len(lines(path)) == 1
    assert "LookupError: nothing to start from" in lines(tmp_path / "log.log")


@pytest.mark.contract("E7")
def test_failing_initializer_ends_running_calls(tmp_path: Path, gate: Gate) -> None:
    """Calls that run when an initializer fails are killed, and fail in the same way."""
    path = str(tmp_path / "log")
    with JobserverExecutor(2, "fork", initialize_if_missing, (path,)) as executor:
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        failed = executor.submit(identity, 1)
        with pytest.raises(BrokenProcessPool, match="initializer"):
            failed.result(PATIENCE)
        with pytest.raises(BrokenProcessPool, match="initializer"):
            running.result(PATIENCE)


@pytest.mark.contract("E7", "E3")
def test_failing_initializer_spares_the_jobserver(tmp_path: Path, gate: Gate) -> None:
    """A broken executor leaves the Jobserver it was given, and who else uses it, as they were."""
    with Jobserver("fork", 2) as js:
        direct = js.submit(gate.enter)
        broken = JobserverExecutor(js, None, fail_to_initialize, (str(tmp_path / "log"),))
        assert isinstance(broken.submit(identity, 1).exception(PATIENCE), BrokenProcessPool)
        broken.shutdown()
        with JobserverExecutor(js) as executor:
            assert executor.submit(identity, 2).result(PATIENCE) == 2
        gate.open()
        assert direct.result(PATIENCE) == gate.entered()[0]


@pytest.mark.contract("E7", "E6")
def test_initializer_that_dies() -> None:
    """An initializer that ends its worker is a worker's death: each call tells of its own."""
    with JobserverExecutor(1, "fork", os._exit, (6,)) as executor:
        for _ in range(2):
            error = executor.submit(identity, 1).exception(PATIENCE)
            assert isinstance(error, BrokenProcessPool)
            assert isinstance(error, SubmissionDied)
            assert error.exitcode == 6


@pytest.mark.contract("E7")
def test_initializer_that_cannot_be_pickled() -> None:
    """What pickling the initializer raises is told to each call."""
    with JobserverExecutor(1, "forkserver", lambda: None) as executor:
        errors = [executor.submit(identity, n).exception(PATIENCE) for n in range(2)]
        assert all(isinstance(error, (pickle.PicklingError, AttributeError)) for error in errors)


# Limits


@pytest.mark.contract("E5", "E6")
def test_out_of_descriptors(gate: Gate) -> None:
    """A call for which there is no descriptor fails with OSError; the next ones work again."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with JobserverExecutor(2, "fork") as executor:
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        await_running(running)
        wait_until(lambda: "running=1" in repr(executor), "the start to be complete")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            error = executor.submit(identity, 1).exception(PATIENCE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert isinstance(error, OSError)
        assert executor.submit(identity, 2).result(PATIENCE) == 2
        gate.open()
        assert running.result(PATIENCE) == gate.entered()[0]


@pytest.mark.contract("E5", "E1")
def test_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """submit raises what starting the thread raises; nothing is left, and the next call works."""
    import threading

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with JobserverExecutor(1, "fork") as executor:
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start"):
                    executor.submit(identity, 1)
        assert "pending=0" in repr(executor)
        # The descriptor that reports the jobs may stay open for the next call.
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert executor.submit(identity, 2).result(PATIENCE) == 2
