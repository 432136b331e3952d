# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Executors inside jobs, where the job may hold the only slot; and in forked processes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from executor_jobs import (
    accounted_tree,
    around_without_slot,
    completed_order,
    deeper,
    exception_of_nested,
    executor_threads,
    fresh_executor,
    from_two_threads,
    hold_while_waiting,
    in_threads,
    leave_pending,
    nested_deaths,
    nested_with_timeout,
    shut_down_with_pending,
    sum_by_map,
    sum_by_submit,
    two_executors,
    use_inherited,
)
from helpers import PATIENCE, Gate, free_slots, identity, lines, sleep, wait_until
from nesting_jobs import Account

from jobserver import Blocked, Jobserver, JobserverExecutor

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])
lending = pytest.mark.parametrize("lend", [False, True])

#: A job that waits in one way or another for calls of an executor of its own, and its result.
WAITING: list[tuple[Any, tuple[Any, ...], Any]] = [
    (sum_by_submit, (4,), 6),
    (sum_by_map, (4,), 6),
    (exception_of_nested, (), repr(ZeroDivisionError("integer division or modulo by zero"))),
    (two_executors, (), [0, 0, 1, 1, 2, 2]),
    (from_two_threads, (3,), [3, 3]),
    (fresh_executor, (), [0, 1, 2]),
    (deeper, (3,), 3),
]


@pytest.mark.contract("N3", "N4", "E3")
@lending
def test_executor_in_the_only_job(method: str, lend: bool) -> None:
    """An executor inside a job works when the job holds the only slot."""
    with Jobserver(method, 1, lend=lend) as js:
        assert js.submit(sum_by_map, args=(js, 3)).result(PATIENCE) == 3


@pytest.mark.contract("N3", "N4", "E3", "E5")
@pytest.mark.parametrize(("job", "args", "expected"), WAITING)
@pytest.mark.parametrize("slots", [1, 2])
@lending
@swift
def test_waiting_in_a_job(
    job: Any, args: tuple[Any, ...], expected: Any, slots: int, lend: bool, method: str, gate: Gate
) -> None:
    """However a job waits without a timeout for its executor, it goes on, and no slot is lost."""
    with Jobserver(method, slots, lend=lend) as js:
        found = js.submit(job, args=(js, *args)).result(PATIENCE)
        if job is exception_of_nested:  # whose words differ between versions
            assert found.startswith("ZeroDivisionError")
        else:
            assert found == expected
        assert free_slots(js, gate) == slots


@pytest.mark.contract("N3", "E5")
@pytest.mark.parametrize("job", [shut_down_with_pending, leave_pending])
@lending
def test_end_with_pending_calls(job: Any, lend: bool, method: str, tmp_path: Path) -> None:
    """Calls that are pending when a job shuts its executor down, or ends, are done first."""
    log = tmp_path / "log"
    with Jobserver(method, 1, lend=lend) as js:
        found = js.submit(job, args=(js, str(log), 3)).result(PATIENCE)
        assert lines(log) == ["0", "1", "2"]
        assert found == (3 if job is shut_down_with_pending else "left")


@pytest.mark.contract("N3", "E6")
@lending
@swift
def test_deaths_on_the_own_slot(lend: bool, method: str, gate: Gate) -> None:
    """A call that dies on the job's own slot brings it back."""
    with Jobserver(method, 1, lend=lend) as js:
        found = js.submit(nested_deaths, args=(js,)).result(PATIENCE)
        assert found == ["WorkerDied"] * 3 + ["NoneType"]
        assert free_slots(js, gate) == 1


@pytest.mark.contract("N9", "E5")
@swift
def test_waits_with_a_timeout_do_not_lend(method: str) -> None:
    """result(timeout) lends nothing, so the call stays pending; result() then has it run."""
    with Jobserver(method, 1) as js:
        assert js.submit(nested_with_timeout, args=(js,)).result(PATIENCE) == ["late", 5]


@pytest.mark.contract("N3")
@swift
def test_job_without_a_slot(method: str) -> None:
    """An executor in a job that consumes no slot gets one from those who wait above it."""
    with Jobserver(method, 1) as js:
        assert js.submit(around_without_slot, args=(js, 3)).result(PATIENCE) == 3


@pytest.mark.contract("E5")
@swift
def test_as_completed_with_a_slot_left(method: str) -> None:
    """as_completed, which lends nothing, works in a job while another slot is free."""
    with Jobserver(method, 2) as js:
        assert js.submit(completed_order, args=(js,)).result(PATIENCE) == [0, 1, 2]


@pytest.mark.contract("N6")
@swift
def test_waiting_keeps_its_slot_without_lend(method: str, gate: Gate) -> None:
    """While a call runs on another slot, only a job with lend=True gives its own to others."""
    for lend in (False, True):
        with Jobserver(method, 2, lend=lend) as js:
            job = js.submit(hold_while_waiting, args=(js, gate))
            gate.await_entered(1 + lend)
            if lend:
                beside = js.submit(identity, args=(1,), timeout=PATIENCE)
                assert beside.result(PATIENCE) == 1
                gate.open()
                assert job.result(PATIENCE) in gate.entered()
            else:
                with pytest.raises(Blocked):
                    js.submit(identity, args=(1,), timeout=0.1)
                job._send(signal.SIGKILL)
                wait_until(job.done, "the job to die")


@pytest.mark.contract("N1", "N5", "N7")
@pytest.mark.parametrize("slots", [1, 2, 3])
@lending
@swift
def test_never_more_jobs_than_slots(slots: int, lend: bool, method: str, tmp_path: Path) -> None:
    """In a tree of executors never more jobs run than there are slots."""
    account = Account(tmp_path / "account")
    with Jobserver(method, slots, lend=lend) as js:
        job = js.submit(accounted_tree, args=(js, account, 2, 2))
        assert job.result(3 * PATIENCE) == 7
    assert 1 <= account.peak() <= slots


@pytest.mark.contract("N3")
@swift
def test_many_jobs_with_executors(method: str, gate: Gate) -> None:
    """Jobs with executors of their own compete for few slots, and all end."""
    with Jobserver(method, 2) as js:
        jobs = [js.submit(sum_by_map, args=(js, 3)) for _ in range(6)]
        assert [job.result(PATIENCE) for job in jobs] == [3] * 6
        assert free_slots(js, gate) == 2


@pytest.mark.contract("E3")
def test_nothing_is_lent_outside_of_jobs(gate: Gate) -> None:
    """In the main program waiting for an executor lends nothing: there is no slot to lend."""
    with Jobserver("fork", 1) as js, JobserverExecutor(js) as executor:
        direct = js.submit(gate.enter)
        gate.await_entered(1)
        timer = threading.Timer(0.1, gate.open)
        timer.start()
        assert executor.submit(identity, 1).result() == 1
        assert direct.result(PATIENCE) == gate.entered()[0]
        timer.join()


# Forks


@pytest.mark.contract("E5")
def test_executor_of_the_parent(gate: Gate) -> None:
    """In a forked process the parent's executor refuses work, and its futures say why."""
    with Jobserver("fork", 2) as js, JobserverExecutor(js) as executor:
        future = executor.submit(gate.enter)
        gate.await_entered(1)
        said = js.submit(use_inherited, args=(executor, future)).result(PATIENCE)
        assert len(said) == 3
        assert all("forked" in words for words in said)

        gate.open()
        assert future.result(PATIENCE) == gate.entered()[0]
        assert executor.submit(identity, 1).result(PATIENCE) == 1


@pytest.mark.contract("E5", "E1")
def test_fork_by_the_user(gate: Gate) -> None:
    """A process that merely forks leaves the child without thread, and the parent as it was."""
    with JobserverExecutor(1, "fork") as executor:
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        pending = executor.submit(identity, 1)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                assert executor_threads() == []
                executor.shutdown(cancel_futures=True)
                pending.cancel()
                fresh = JobserverExecutor(1, "fork")
                assert fresh.submit(identity, 2).result(PATIENCE) == 2
                fresh.shutdown()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        gate.open()
        assert running.result(PATIENCE) == gate.entered()[0]
        assert pending.result(PATIENCE) == 1


@pytest.mark.contract("E5")
def test_forks_amid_submissions() -> None:
    """Forks by other threads at any moment do not disturb an executor."""
    with JobserverExecutor(2, "fork") as executor:
        over = threading.Event()

        def fork() -> int:
            count = 0
            while not over.is_set() and count < 200:
                pid = os.fork()
                if not pid:
                    os._exit(0)
                assert os.waitpid(pid, 0)[1] == 0
                count += 1
            return count

        def work() -> list[int]:
            try:
                return [executor.submit(identity, n).result(PATIENCE) for n in range(60)]
            finally:
                over.set()

        forks, found = in_threads(fork, work)
        assert forks > 0
        assert found == list(range(60))


@pytest.mark.contract("E5")
def test_interrupted_wait() -> None:
    """Ctrl-C interrupts result() and shutdown(), and both can be called again."""
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(sleep, 1.0)
        for wait in (future.result, executor.shutdown):
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                wait()
            timer.join()
        assert future.result(PATIENCE) == 1.0
