# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Crowds of short calls, which an executor's workers take from a queue by themselves."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Callable

import pytest
from executor_jobs import (
    fail_to_initialize,
    in_threads,
    initialize,
    initialized,
    leave_thread,
    make_lock,
    note_and_return,
    push,
    set_variable,
)
from helpers import PATIENCE, Gate, add, die, getenv, identity, lines, run_program, wait_until
from map_jobs import soft_exit_result

from jobserver import Jobserver, JobserverExecutor, SubmissionDied

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])

#: More than are handed over one by one.
CROWD = 60


class Held:
    """An executor all slots of which are held by calls, so that others are queued together."""

    def __init__(self, executor: JobserverExecutor, slots: int, gate: Gate) -> None:
        self._executor: Any = executor
        self._gate = gate
        self._first = [executor.submit(gate.enter) for _ in range(slots)]
        gate.await_entered(slots)

    def open(self) -> None:
        """Let the calls go on that were submitted meanwhile."""
        self._gate.open()
        for future in self._first:
            future.result(PATIENCE)
        assert self._executor._engine._runs.calls is not None


@pytest.mark.contract("E10", "E5")
def test_result_that_ends_who_unpickles_it(gate: Gate) -> None:
    """A result that raises SystemExit when it is unpickled is the failure of its own call."""
    with JobserverExecutor(2, "fork") as executor:
        held = Held(executor, 2, gate)
        found = [executor.submit(soft_exit_result, n, 30) for n in range(CROWD)]
        held.open()
        with pytest.raises(BrokenProcessPool, match="SystemExit"):
            found.pop(30).result(PATIENCE)
        assert [future.result(PATIENCE) for future in found] == [*range(30), *range(31, CROWD)]


@pytest.mark.contract("E10", "E5")
def test_crowd(method: str, gate: Gate) -> None:
    """Of many calls each gives what it would give alone: values, failures, large results."""
    with JobserverExecutor(2, method) as executor:
        held = Held(executor, 2, gate)
        sums = [executor.submit(add, number, b=number) for number in range(CROWD)]
        failed = executor.submit(divmod, 1, 0)
        large = executor.submit(bytes, 1 << 20)
        sent = executor.submit(len, b"x" * (1 << 20))
        lock = executor.submit(make_lock)
        nothing = [executor.submit(time.sleep, 0) for _ in range(CROWD)]
        held.open()

        assert [future.result(PATIENCE) for future in sums] == [2 * n for n in range(CROWD)]
        with pytest.raises(ZeroDivisionError):
            failed.result(PATIENCE)
        assert large.result(PATIENCE) == bytes(1 << 20)
        assert sent.result(PATIENCE) == 1 << 20
        with pytest.raises(TypeError, match="pickle"):
            lock.result(PATIENCE)
        assert [future.result(PATIENCE) for future in nothing] == [None] * CROWD
        assert "pending=0, running=0" in repr(executor)


@pytest.mark.contract("E10", "E5")
@swift
def test_order(method: str, gate: Gate, tmp_path: Path) -> None:
    """Calls begin in the order of their submission, also where some cannot be queued."""
    log = tmp_path / "log"
    with JobserverExecutor(1, method) as executor:
        held = Held(executor, 1, gate)
        for number in range(CROWD):
            padding = b"x" * (1 << 15) if number % 20 == 10 else b""
            executor.submit(note_and_return, str(log), number, padding)
        held.open()
    assert lines(log) == [str(number) for number in range(CROWD)]


@pytest.mark.contract("E10", "E8")
@swift
def test_pending_until_begun(
    method: str, gate: Gate, make_gate: Callable[[], Gate], tmp_path: Path
) -> None:
    """Behind a call that lasts, calls are pending and can be cancelled, though they are queued."""
    log, inner = tmp_path / "log", make_gate()
    with JobserverExecutor(1, method) as executor:
        held = Held(executor, 1, gate)
        before = [executor.submit(identity, number) for number in range(5)]
        lasting = executor.submit(inner.enter)
        behind = [executor.submit(note_and_return, str(log), number) for number in range(CROWD)]
        held.open()
        inner.await_entered(1)

        assert lasting.running()
        assert not lasting.cancel()
        assert [future.result(PATIENCE) for future in before] == list(range(5))
        assert not any(future.running() or future.done() for future in behind)
        assert all(future.cancel() for future in behind[1::2])
        assert not any(future.running() for future in behind[::2])
        assert f"pending={CROWD // 2}, running=1" in repr(executor)
        inner.open()
        assert lasting.result(PATIENCE) == inner.entered()[0]
        assert [future.result(PATIENCE) for future in behind[::2]] == list(range(0, CROWD, 2))
    assert lines(log) == [str(number) for number in range(0, CROWD, 2)]


@pytest.mark.contract("E10")
@swift
def test_long_call_holds_up_nobody(method: str, gate: Gate, make_gate: Callable[[], Gate]) -> None:
    """While one call lasts, those behind it are made on the other slots."""
    inner = make_gate()
    with JobserverExecutor(2, method) as executor:
        held = Held(executor, 2, gate)
        early = executor.submit(identity, 0)
        lasting = executor.submit(inner.enter)
        behind = [executor.submit(identity, number) for number in range(CROWD)]
        held.open()

        assert [future.result(PATIENCE) for future in behind] == list(range(CROWD))
        assert early.result(PATIENCE) == 0
        assert not lasting.done()
        inner.open()
        assert lasting.result(PATIENCE) == inner.entered()[0]


@pytest.mark.contract("E10", "E6")
def test_death_in_a_crowd(method: str, gate: Gate, tmp_path: Path) -> None:
    """A worker that dies fails the call that it was at; all others are made, once."""
    log = tmp_path / "log"
    with JobserverExecutor(2, method) as executor:
        held = Held(executor, 2, gate)
        futures, dying = [], []
        for number in range(CROWD):
            futures.append(executor.submit(note_and_return, str(log), number))
            if number % 20 == 10:
                dying.append(executor.submit(die, signal.SIGKILL))
        held.open()
        for future in dying:
            error = future.exception(PATIENCE)
            assert isinstance(error, SubmissionDied)
            assert error.exitcode == -signal.SIGKILL
        assert [future.result(PATIENCE) for future in futures] == list(range(CROWD))
    assert Counter(lines(log)) == Counter(map(str, range(CROWD)))


@pytest.mark.contract("E10", "E6")
@pytest.mark.parametrize("seed", range(2))
@swift
def test_killed_at_any_instant(method: str, seed: int, tmp_path: Path) -> None:
    """However many workers are killed, and whenever: no call begins twice, none is forgotten."""
    chance = random.Random(seed)
    count = 300
    log = tmp_path / "log"
    stop = threading.Event()
    executor: Any
    with JobserverExecutor(3, method) as executor:

        def kill() -> None:
            while not stop.wait(chance.uniform(0.001, 0.01)):
                for job in list(executor._engine._runs.jobs):
                    if chance.random() < 0.5:
                        job._send(signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        futures = [executor.submit(note_and_return, str(log), number) for number in range(count)]
        errors = [future.exception(PATIENCE) for future in futures]
        stop.set()
        thread.join()
    begun = Counter(map(int, lines(log)))
    assert max(begun.values(), default=1) == 1
    for number, error in enumerate(errors):
        assert begun[number] == 1 or isinstance(error, SubmissionDied)
        assert error is None or isinstance(error, SubmissionDied)


@pytest.mark.contract("E10", "W1")
@swift
def test_each_call_has_its_own_arguments(method: str, gate: Gate) -> None:
    """Calls that were given one object each get a copy, as those do that run alone."""
    shared: list[int] = []
    with JobserverExecutor(1, method) as executor:
        held = Held(executor, 1, gate)
        futures = [executor.submit(push, shared, number) for number in range(CROWD)]
        held.open()
        assert [future.result(PATIENCE) for future in futures] == [[n] for n in range(CROWD)]


@pytest.mark.contract("E10", "W2")
@swift
def test_surroundings(method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call changes in the environment is undone; what changes here is seen by later ones."""
    with JobserverExecutor(1, method) as executor:
        held = Held(executor, 1, gate)
        futures = [executor.submit(set_variable, "CROWD", str(n)) for n in range(CROWD)]
        held.open()
        assert [future.result(PATIENCE) for future in futures] == [None] * CROWD
        for round_ in range(5):
            monkeypatch.setenv("CROWD", str(round_))
            found = [executor.submit(getenv, "CROWD") for _ in range(CROWD)]
            assert [future.result(PATIENCE) for future in found] == [[str(round_)]] * CROWD


@pytest.mark.contract("E10", "W1")
def test_process_that_cannot_stay(gate: Gate, tmp_path: Path) -> None:
    """A call that leaves a thread behind is over when that is; others are made all the same."""
    log = tmp_path / "log"
    with JobserverExecutor(1, "fork") as executor:
        held = Held(executor, 1, gate)
        futures = [executor.submit(leave_thread, str(log), number) for number in range(20)]
        held.open()
        for number, future in enumerate(futures):
            pid = future.result(PATIENCE)
            assert f"{number} {pid}" in lines(log)
    assert len(lines(log)) == 20


@pytest.mark.contract("E10", "E5")
@pytest.mark.parametrize("how", ["cancel", "kill", "wait"])
def test_shutdown_of_a_crowd(how: str, gate: Gate, make_gate: Callable[[], Gate]) -> None:
    """Whichever way an executor is shut down, each of many calls is cancelled, made, or dead."""
    inner = make_gate()
    executor = JobserverExecutor(1, "fork")
    held = Held(executor, 1, gate)
    lasting = executor.submit(inner.enter)
    behind = [executor.submit(identity, number) for number in range(CROWD)]
    held.open()
    inner.await_entered(1)
    if how == "kill":
        executor.kill_workers()
        assert isinstance(lasting.exception(PATIENCE), SubmissionDied)
    else:
        executor.shutdown(wait=False, cancel_futures=how == "cancel")
        inner.open()
        assert lasting.result(PATIENCE) == inner.entered()[0]
    executor.shutdown()
    assert all(future.done() for future in behind)
    assert all(future.cancelled() is (how != "wait") for future in behind)


@pytest.mark.contract("E10", "E7")
@swift
def test_initializers_of_a_crowd(method: str) -> None:
    """Each worker that takes calls by itself is initialized once."""
    with JobserverExecutor(2, method, initialize, ("ready",)) as executor:
        futures = [executor.submit(initialized) for _ in range(CROWD)]
        assert all(future.result(PATIENCE) == ["ready"] for future in futures)


@pytest.mark.contract("E10", "E7")
@swift
def test_failing_initializer_fails_a_crowd(method: str, tmp_path: Path) -> None:
    """If an initializer fails, so do all calls."""
    with JobserverExecutor(2, method, fail_to_initialize, (str(tmp_path / "log"),)) as executor:
        futures: list[Any] = []
        with pytest.raises(BrokenProcessPool):
            while True:
                futures.append(executor.submit(identity, 1))
        for future in futures:
            with pytest.raises(BrokenProcessPool, match="initializer"):
                future.result(PATIENCE)


@pytest.mark.contract("E10", "E6")
def test_initializer_that_dies_before_a_crowd() -> None:
    """If workers die before they begin with any call, each call tells of a death of its own."""
    with JobserverExecutor(2, "fork", os._exit, (6,)) as executor:
        futures = [executor.submit(identity, number) for number in range(CROWD)]
        for future in futures:
            error = future.exception(PATIENCE)
            assert isinstance(error, SubmissionDied)
            assert error.exitcode == 6


@pytest.mark.contract("E10", "W1")
def test_functions_that_are_defined_later() -> None:
    """Under fork a function of the main module is the one that it is at the call."""
    assert run_program(["-c", REDEFINING]).stdout == "['first'] ['second'] ['third']\n"


REDEFINING = """
from jobserver import JobserverExecutor

with JobserverExecutor(2, "fork") as executor:
    found = []
    for word in ("first", "second", "third"):
        exec(f"def tell(number): return {word!r}")
        futures = [executor.submit(tell, number) for number in range(100)]
        found.append(sorted({future.result(30) for future in futures}))
    print(*found)
"""


@pytest.mark.contract("E10", "E3")
def test_slot_is_free_after_a_crowd() -> None:
    """When all results are there, so are the slots."""
    with Jobserver("fork", 2, max_tasks_per_child=None) as js, JobserverExecutor(js) as executor:
        for _ in range(3):
            for future in [executor.submit(identity, n) for n in range(CROWD)]:
                future.result(PATIENCE)
            direct = [js.submit(identity, args=(n,), timeout=PATIENCE) for n in range(2)]
            assert [each.result(PATIENCE) for each in direct] == [0, 1]


@pytest.mark.contract("H13", "E5")
@swift
def test_one_by_one_from_many_threads(method: str) -> None:
    """Threads that submit one call after the other each get their own results."""
    with JobserverExecutor(2, method) as executor:

        def work(start: int) -> list[int]:
            return [executor.submit(identity, start + n).result(PATIENCE) for n in range(50)]

        works = [lambda start=100 * n: work(start) for n in range(4)]
        expected = [list(range(100 * n, 100 * n + 50)) for n in range(4)]
        assert in_threads(*works) == expected


@pytest.mark.contract("E6", "E5")
@swift
def test_worker_that_died_at_rest(method: str) -> None:
    """A call that finds that the worker at rest has died is made by another one."""
    with JobserverExecutor(1, method) as executor:
        for number in range(5):
            pid = executor.submit(os.getpid).result(PATIENCE)
            os.kill(pid, signal.SIGKILL)
            future = executor.submit(identity, number)
            error = future.exception(PATIENCE)
            assert error is None or isinstance(error, SubmissionDied)
        wait_until(lambda: "running=0" in repr(executor), "all calls to be over")
