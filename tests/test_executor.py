# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""JobserverExecutor: what it is made of, what it runs on, what a call gets."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed, wait
from concurrent.futures import Future as StdFuture
from pathlib import Path
from typing import Any, Callable

import pytest
from executor_jobs import Recorder, await_running, executor_threads, in_threads, note_once, noted
from helpers import (
    METHODS,
    PATIENCE,
    Gate,
    add,
    everything,
    getenv,
    identity,
    lines,
    pid,
    sleep,
    wait_until,
)
from jobs import Appender, name_of_worker, signal_state

from jobserver import Blocked, Jobserver, JobserverExecutor

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


@pytest.mark.contract("E1", "E5")
def test_call_and_result(method: str) -> None:
    """submit returns a concurrent.futures.Future that gets what fn returns."""
    with JobserverExecutor(2, method) as executor:
        assert isinstance(executor, Executor)
        future = executor.submit(add, 1, b=2)
        assert isinstance(future, StdFuture)

        assert future.result(timeout=PATIENCE) == 3
        assert future.done()
        assert future.exception(timeout=0) is None


@pytest.mark.contract("E5")
def test_keyword_arguments_of_any_name() -> None:
    """Keyword arguments named fn and self reach fn, and fn itself is positional only."""
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(everything, 1, self=2, fn=3)
        assert future.result(PATIENCE) == ((1,), {"self": 2, "fn": 3})
        with pytest.raises(TypeError):
            executor.submit(fn=add)  # type: ignore[call-arg]


@pytest.mark.contract("E5")
def test_what_cannot_be_called() -> None:
    """submit refuses at once what is no callable, and goes on."""
    with JobserverExecutor(1, "fork") as executor:
        with pytest.raises(TypeError):
            executor.submit(5)  # type: ignore[arg-type]
        assert executor.submit(add, 1).result(PATIENCE) == 1


@pytest.mark.contract("E1")
@swift
def test_one_thread(method: str, gate: Gate) -> None:
    """There is no thread before the first call, one whatever runs, and none after shutdown."""
    # Those of the tests before may be about to end.
    system = set(os.listdir("/proc/self/task"))
    with JobserverExecutor(3, method) as executor:
        assert executor_threads() == []
        futures = [executor.submit(gate.enter) for _ in range(5)]
        gate.await_entered(3)

        assert len(executor_threads()) == 1
        assert len(set(os.listdir("/proc/self/task")) - system) == 1
        gate.open()
        assert len({future.result(PATIENCE) for future in futures}) == 3
        assert len(set(os.listdir("/proc/self/task")) - system) == 1
    assert executor_threads() == []


@pytest.mark.contract("E1", "E5")
def test_signals_are_for_the_main_thread(method: str) -> None:
    """The executor's thread has them blocked; its workers, and theirs, have not."""
    with JobserverExecutor(1, method) as executor:
        assert executor.submit(signal_state).result(PATIENCE) == ([], True)
        (thread,) = executor_threads()
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()

    blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
    assert blocked >> (signal.SIGINT - 1) & 1


@pytest.mark.contract("E1")
def test_one_thread_when_many_submit_first() -> None:
    """Threads that submit the first calls at the same time start one thread between them."""
    with JobserverExecutor(2, "fork") as executor:

        def work() -> int:
            value: int = executor.submit(identity, 1).result(PATIENCE)
            return value

        assert in_threads(*[work] * 8) == [1] * 8
        assert len(executor_threads()) == 1


# Construction


@pytest.mark.contract("E2")
def test_signature() -> None:
    """The parameters are those of the contract, and max_workers by name, as drop-in code has it."""
    parameters = inspect.signature(JobserverExecutor).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY

    assert [name for name, p in parameters.items() if p.kind is not keyword] == [
        "jobserver_or_max_workers",
        "mp_context",
        "initializer",
        "initargs",
    ]
    assert {name for name, p in parameters.items() if p.kind is keyword} == {
        "max_workers",
        "max_tasks_per_child",
    }
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults.pop("initargs") == ()
    assert set(defaults.values()) == {None}


@pytest.mark.contract("E4")
def test_max_workers_by_name() -> None:
    """What is written for ProcessPoolExecutor works with the class exchanged."""
    context = multiprocessing.get_context("fork")
    for kind in (ProcessPoolExecutor, JobserverExecutor):
        pool: Any = kind
        with pool(max_workers=2, mp_context=context, initializer=None, initargs=()) as executor:
            assert executor.submit(add, 1, 2).result(PATIENCE) == 3


@pytest.mark.contract("E4")
def test_max_workers_is_the_limit(method: str, gate: Gate) -> None:
    """No more calls run at once than max_workers says, and as many."""
    with JobserverExecutor(2, method) as executor:
        futures = [executor.submit(gate.enter) for _ in range(4)]
        gate.await_entered(2)

        assert [future.running() for future in futures] == [True, True, False, False]
        assert len(gate.entered()) == 2
        gate.open()
        assert len({future.result(PATIENCE) for future in futures}) == 2


@pytest.mark.contract("E4")
def test_default_is_one_for_each_cpu(gate: Gate) -> None:
    """Without a count as many calls run at once as this process may use CPUs."""
    cpus = len(os.sched_getaffinity(0))
    with JobserverExecutor(mp_context="fork") as executor:
        futures = [executor.submit(gate.enter) for _ in range(cpus + 1)]
        gate.await_entered(cpus)

        assert sum(future.running() for future in futures) == cpus
        gate.open()


@pytest.mark.contract("E4")
@pytest.mark.parametrize("count", [0, -1])
def test_count_too_small(count: int) -> None:
    """A count below 1 is refused in the standard library's words."""
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        JobserverExecutor(count)
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        JobserverExecutor(max_workers=count)


@pytest.mark.contract("E4")
@pytest.mark.parametrize("count", [True, "2", 1.5, object()])
def test_count_of_wrong_type(count: Any) -> None:
    """A count that is no int is refused."""
    with pytest.raises(TypeError):
        JobserverExecutor(count)


@pytest.mark.contract("E4")
def test_context(method: str) -> None:
    """mp_context may be a multiprocessing context, or its name."""
    for context in (method, multiprocessing.get_context(method)):
        with JobserverExecutor(1, context) as executor:
            assert executor.submit(name_of_worker).result(PATIENCE) == "Jobserver-worker"
            assert f"Jobserver({method!r}" in repr(executor)
    with pytest.raises(ValueError):
        JobserverExecutor(1, "thread")


@pytest.mark.contract("E2")
def test_contradicting_arguments() -> None:
    """A count twice, or the start method of a Jobserver that has one, is refused."""
    with Jobserver("fork", 1) as js:
        with pytest.raises(TypeError):
            JobserverExecutor(js, max_workers=2)
        with pytest.raises(ValueError):
            JobserverExecutor(js, "spawn")
    with pytest.raises(TypeError):
        JobserverExecutor(1, max_workers=1)
    with pytest.raises(TypeError):
        JobserverExecutor(1, initializer=3)  # type: ignore[arg-type]


@pytest.mark.contract("E2", "E4")
def test_max_tasks_per_child() -> None:
    """max_tasks_per_child is checked, and chooses the start method, as in the standard library."""
    for bad in (0, -1):
        with pytest.raises(ValueError):
            JobserverExecutor(1, max_tasks_per_child=bad)
    for wrong in (True, 1.0, "1"):
        with pytest.raises(TypeError):
            JobserverExecutor(1, max_tasks_per_child=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        JobserverExecutor(1, "fork", max_tasks_per_child=1)
    with JobserverExecutor(1, max_tasks_per_child=1) as executor:
        assert "'spawn'" in repr(executor)
    with Jobserver("fork", 1, max_tasks_per_child=1) as js, JobserverExecutor(js) as executor:
        pids = [executor.submit(os.getpid).result(PATIENCE) for _ in range(2)]
        assert len(set(pids)) == 2


# On a Jobserver


@pytest.mark.contract("E3")
def test_given_jobserver_is_used_and_not_closed(method: str, gate: Gate) -> None:
    """Calls take the slots of the Jobserver, which goes on after shutdown."""
    with Jobserver(method, 1) as js:
        with JobserverExecutor(js) as executor:
            future = executor.submit(gate.enter)
            gate.await_entered(1)
            with pytest.raises(Blocked):
                js.submit(identity, args=(1,), timeout=0)
            gate.open()
            future.result(PATIENCE)
        assert js.submit(identity, args=(2,)).result(PATIENCE) == 2


@pytest.mark.contract("E4")
@swift
def test_own_jobserver_is_closed(method: str) -> None:
    """After shutdown nothing is left of a Jobserver that the executor has made."""
    before = len(os.listdir("/proc/self/fd"))
    for used in (False, True):
        executor = JobserverExecutor(2, method)
        if used:
            executor.submit(identity, 1).result(PATIENCE)
        executor.shutdown()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.contract("E3")
@swift
def test_slots_are_shared(method: str, gate: Gate) -> None:
    """Two executors and direct submissions on one Jobserver never run more than its slots."""
    js = Jobserver(method, 2)
    with js, JobserverExecutor(js) as one, JobserverExecutor(js) as other:
        futures = [pool.submit(gate.enter) for _ in range(3) for pool in (one, other)]
        gate.await_entered(2)
        with pytest.raises(Blocked):
            js.submit(gate.enter, timeout=0.1)

        assert len(gate.entered()) == 2
        gate.open()
        direct = js.submit(gate.enter)
        assert len([future.result(PATIENCE) for future in futures]) == 6
        assert direct.result(PATIENCE)


@pytest.mark.contract("E3")
def test_waits_for_direct_submissions(gate: Gate) -> None:
    """A call waits for a slot that a direct submission holds, and gets it when that ends."""
    with Jobserver("fork", 1) as js, JobserverExecutor(js) as executor:
        direct = js.submit(gate.enter)
        gate.await_entered(1)
        future = executor.submit(identity, 1)

        assert not future.running()
        gate.open()
        assert future.result(PATIENCE) == 1
        assert direct.result(PATIENCE) == gate.entered()[0]


@pytest.mark.contract("E3")
def test_callbacks_of_direct_submissions() -> None:
    """The executor's thread does not issue callbacks that belong to a user's thread."""
    note = Recorder()
    with Jobserver("fork", 2) as js, JobserverExecutor(js) as executor:
        direct = js.submit(identity, args=(1,))
        direct.when_done(note, "called")
        assert executor.submit(sleep, 0.05).result(PATIENCE) == 0.05
        wait_until(lambda: "tracked=0" in repr(js), "the job to end")
        assert note.calls == []

        assert direct.result() == 1
        assert note.threads == [threading.current_thread().name]


@pytest.mark.contract("E3")
def test_defaults_of_given_jobserver(method: str, tmp_path: Path) -> None:
    """env and preexec_fn of the given Jobserver are applied to each call."""
    log = tmp_path / "log"
    js = Jobserver(method, 2, env={"JOBSERVER_T": "set"}, preexec_fn=Appender(log))
    with js, JobserverExecutor(js) as executor:
        assert executor.submit(getenv, "JOBSERVER_T").result(PATIENCE) == ["set"]
        assert list(executor.map(getenv, ["JOBSERVER_T"] * 2)) == [["set"]] * 2
    assert len(lines(log)) == 3


@pytest.mark.contract("E3", "E8")
def test_sleep_fn_of_given_jobserver(gate: Gate) -> None:
    """sleep_fn is asked here, before a slot is taken, until it lets the call in."""
    answers = iter([0.02, 0, None, None])
    asked: list[tuple[int, bool]] = []

    def sleep_fn() -> float | None:
        asked.append((os.getpid(), first.running()))
        return next(answers)

    with Jobserver("fork", 1, sleep_fn=sleep_fn) as js, JobserverExecutor(js) as executor:
        first: StdFuture[Any] = StdFuture()
        first = executor.submit(identity, 1)
        assert first.result(PATIENCE) == 1
        assert executor.submit(identity, 2).result(PATIENCE) == 2
    assert asked == [(os.getpid(), False)] * 4


@pytest.mark.contract("E3", "E8")
def test_sleep_fn_takes_no_slot() -> None:
    """A call that sleep_fn holds up holds no slot, and can be cancelled."""
    with Jobserver("fork", 1) as js:
        gated = js.replace(sleep_fn=lambda: 3600)
        with JobserverExecutor(gated) as executor:
            future = executor.submit(identity, 1)
            assert js.submit(identity, args=(2,), timeout=PATIENCE).result(PATIENCE) == 2
            assert future.cancel()


@pytest.mark.contract("E3", "E5")
@pytest.mark.parametrize("answer", ["soon", -1, SystemExit(3)])
def test_sleep_fn_that_fails(answer: Any) -> None:
    """What is wrong with sleep_fn is told to the call that it was asked for; others go on."""
    answers = iter([answer, None])

    def sleep_fn() -> Any:
        said = next(answers)
        if isinstance(said, BaseException):
            raise said
        return said

    with Jobserver("fork", 1, sleep_fn=sleep_fn) as js, JobserverExecutor(js) as executor:
        failed = executor.submit(identity, 1)
        with pytest.raises((ValueError, SystemExit)):
            failed.result(PATIENCE)
        assert executor.submit(identity, 2).result(PATIENCE) == 2


@pytest.mark.contract("E3")
def test_closed_jobserver(gate: Gate) -> None:
    """A closed Jobserver refuses calls with RuntimeError, also those that are pending already."""
    with Jobserver("fork", 1) as js:
        executor = JobserverExecutor(js)
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        pending = executor.submit(identity, 1)
    with pytest.raises(RuntimeError, match="closed"):
        pending.result(PATIENCE)
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(identity, 2)
    gate.open()
    assert running.result(PATIENCE) == gate.entered()[0]
    executor.shutdown()


# What the standard library builds on executors


@pytest.mark.contract("E5")
@swift
def test_wait_and_as_completed(method: str, gate: Gate) -> None:
    """wait() and as_completed() work as with any executor."""
    with JobserverExecutor(2, method) as executor:
        held = executor.submit(gate.enter)
        quick = executor.submit(identity, 1)
        done, rest = wait([held, quick], PATIENCE, concurrent.futures.FIRST_COMPLETED)
        assert (done, rest) == ({quick}, {held})
        failing = executor.submit(divmod, 1, 0)
        done, rest = wait([held, failing], PATIENCE, concurrent.futures.FIRST_EXCEPTION)
        assert (done, rest) == ({failing}, {held})
        gate.open()

        assert set(as_completed([held, quick, failing], PATIENCE)) == {held, quick, failing}


@pytest.mark.contract("E5")
@swift
def test_asyncio(method: str, gate: Gate) -> None:
    """run_in_executor works, with exceptions, many at once, and cancellation of what is pending."""

    async def program(executor: JobserverExecutor) -> list[Any]:
        loop = asyncio.get_running_loop()
        held = loop.run_in_executor(executor, gate.enter)
        await loop.run_in_executor(None, gate.await_entered, 1)
        pending = loop.run_in_executor(executor, identity, "never")
        pending.cancel()
        gate.open()
        await held
        found: list[Any] = list(
            await asyncio.gather(
                *(loop.run_in_executor(executor, identity, n) for n in range(5)),
                loop.run_in_executor(executor, divmod, 1, 0),
                pending,
                return_exceptions=True,
            )
        )
        return found

    with JobserverExecutor(1, method) as executor:
        found = asyncio.run(program(executor))
    assert found[:5] == list(range(5))
    assert [type(error) for error in found[5:]] == [ZeroDivisionError, asyncio.CancelledError]


@pytest.mark.contract("E5")
def test_done_callbacks() -> None:
    """Callbacks get the future, run in order on the executor's thread, and one may submit."""
    notes = [Recorder(), Recorder(LookupError("logged")), Recorder()]
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(sleep, 0.05)
        for note in notes:
            future.add_done_callback(note)
        more: list[StdFuture[Any]] = []
        future.add_done_callback(lambda f: more.append(executor.submit(identity, f.result())))
        wait_until(lambda: more, "the last callback")

        assert more[0].result(PATIENCE) == 0.05
        assert [note.calls for note in notes] == [[future]] * 3
        assert notes[2].threads == ["JobserverExecutor"]


@pytest.mark.contract("E5")
def test_callback_that_ends_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback that raises SystemExit does not end the thread that all calls depend on."""
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(sleep, 0.05)
        future.add_done_callback(Recorder(SystemExit(3)))
        assert future.result(PATIENCE) == 0.05
        assert executor.submit(identity, 2).result(PATIENCE) == 2
    assert [type(args.exc_value) for args in told] == [SystemExit]


@pytest.mark.contract("E5")
def test_result_with_timeout(gate: Gate) -> None:
    """result and exception raise TimeoutError when it takes longer, and can be asked again."""
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(gate.enter)
        for ask in (future.result, future.exception):
            question: Callable[[float], Any] = ask
            with pytest.raises(concurrent.futures.TimeoutError):
                question(0.01)
        gate.open()
        assert future.result(PATIENCE) == gate.entered()[0]


@pytest.mark.contract("E5")
def test_repr(gate: Gate) -> None:
    """repr says what state the executor is in, and how much is pending and running."""
    with JobserverExecutor(1, "fork") as executor:
        assert repr(executor).startswith("JobserverExecutor(active, pending=0, running=0,")
        futures = [executor.submit(gate.enter) for _ in range(3)]
        gate.await_entered(1)
        await_running(futures[0])
        wait_until(lambda: "pending=2, running=1" in repr(executor), "the numbers")
        gate.open()
    assert repr(executor).startswith("JobserverExecutor(shutdown, pending=0, running=0,")


@pytest.mark.contract("E1", "E5")
@pytest.mark.parametrize("method", METHODS)
def test_many_threads(method: str) -> None:
    """Any thread may submit, map, and wait, at any time."""
    with JobserverExecutor(2, method) as executor:

        def submit() -> list[int]:
            return [executor.submit(identity, n).result(PATIENCE) for n in range(3)]

        def use_map() -> list[int]:
            return list(executor.map(identity, range(3)))

        found = in_threads(submit, use_map, submit, use_map)
        assert found == [[0, 1, 2]] * 4


# Workers


@pytest.mark.contract("E9")
def test_workers_are_warm(method: str) -> None:
    """An executor with a pool of its own has workers that stay, and initializes each once."""
    with JobserverExecutor(1, method, initializer=note_once, initargs=("here",)) as executor:
        told = [executor.submit(noted).result(PATIENCE) for _ in range(3)]

    assert told == [told[0]] * 3
    assert told[0][1] == ["here"]


@pytest.mark.contract("E9")
def test_workers_of_a_given_jobserver(method: str) -> None:
    """On a Jobserver with fresh workers an executor's workers are fresh."""
    with Jobserver(method, 1, max_tasks_per_child=1) as js, JobserverExecutor(js) as executor:
        assert len({executor.submit(pid).result(PATIENCE) for _ in range(3)}) == 3
