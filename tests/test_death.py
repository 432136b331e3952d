# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs that end badly."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    chain_text,
    die,
    fail,
    free_slots,
    hard_exit,
    identity,
    nothing,
    pid,
    settle,
    soft_exit,
    wait_until,
    worker_pid,
)
from jobs_ending import (
    close_descriptors,
    close_streams,
    exec_program,
    ignoring_signals,
)
from marks import by_method

from jobserver import Blocked, Jobserver, SubmissionDied

#: Signals that end a process when nobody handles them; SIGSTOP and the like do not.
DEADLY = sorted(
    set(signal.valid_signals())
    - {
        signal.SIGCHLD,
        signal.SIGCONT,
        signal.SIGURG,
        signal.SIGWINCH,
        signal.SIGSTOP,
        signal.SIGTSTP,
        signal.SIGTTIN,
        signal.SIGTTOU,
    }
)


def expect_death(js: Jobserver, exitcode: int | None, job: Any, *args: Any) -> SubmissionDied:
    """Run a job that dies; its slot must be free at once."""
    future = js.submit(job, args=args)
    with pytest.raises(SubmissionDied) as caught:
        future.result(PATIENCE)
    assert caught.value.exitcode == exitcode
    assert future.done()
    assert js.submit(identity, args=(1,), timeout=0).result(PATIENCE) == 1
    return caught.value


# Ways to end


@pytest.mark.contract("F9", "F10", "S18")
@by_method("status", [0, 1, 7, 255])
def test_hard_exit(method: str, status: int) -> None:
    """os._exit is a SubmissionDied with the exit status, 0 included."""
    with Jobserver(method, 1) as js:
        expect_death(js, status, hard_exit, status)


@pytest.mark.contract("F9", "F10")
@by_method("status, exitcode", [(3, 3), (None, 0), (0, 0), ("a reason", 1)])
def test_soft_exit(method: str, status: Any, exitcode: int) -> None:
    """sys.exit is a SubmissionDied with the exit status, caused by the SystemExit."""
    with Jobserver(method, 1) as js:
        died = expect_death(js, exitcode, soft_exit, status)

    assert isinstance(died.__cause__, SystemExit)
    assert died.__cause__.code == status
    assert "in soft_exit" in chain_text(died)


@pytest.mark.contract("F9", "F10")
def test_keyboard_interrupt(method: str) -> None:
    """KeyboardInterrupt in a job is a SubmissionDied, caused by it."""
    with Jobserver(method, 1) as js:
        future = js.submit(fail, args=(KeyboardInterrupt,))
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)

    assert isinstance(caught.value.__cause__, KeyboardInterrupt)
    assert caught.value.exitcode not in (0, None)


@pytest.mark.contract("F9", "F10")
def test_exec(method: str) -> None:
    """A job that becomes another program is a SubmissionDied with that program's status."""
    with Jobserver(method, 1) as js:
        expect_death(js, 9, exec_program, [sys.executable, "-S", "-c", "import os; os._exit(9)"])


@pytest.mark.contract("F9", "F10")
@by_method("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_signals_with_every_method(method: str, signum: signal.Signals) -> None:
    """A job killed by a signal is a SubmissionDied that names the signal."""
    with Jobserver(method, 1) as js:
        died = expect_death(js, -signum, die, signum)

    assert signum.name in str(died)


@pytest.mark.contract("F9", "F10", "F25")
def test_every_deadly_signal() -> None:
    """Each signal that ends a process is told by its number."""
    js = Jobserver("fork", 4)
    futures = {signum: js.submit(die, args=(signum,)) for signum in DEADLY}
    codes = {}
    for signum, future in futures.items():
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        codes[signum] = caught.value.exitcode

    assert codes == {signum: -signum for signum in DEADLY}


@pytest.mark.contract("F9", "F3")
def test_stopped_job_is_not_dead(gate: Gate) -> None:
    """A job that stops itself keeps its slot and its Future, until it is killed."""
    js = Jobserver("fork", 1)
    future = js.submit(die, args=(signal.SIGSTOP,))
    worker = worker_pid(future)
    wait_until(lambda: Path(f"/proc/{worker}/stat").read_text().split()[2] == "T", "the stop")

    assert future.wait(0.05) is False
    assert future.wait(PATIENCE, signal=signal.SIGKILL) is True
    with pytest.raises(SubmissionDied):
        future.result(0)
    assert free_slots(js, gate) == 1


@pytest.mark.contract("F5", "F9")
def test_job_that_ignores_signals(method: str, gate: Gate) -> None:
    """SIGTERM does not end a job that ignores it; SIGKILL does."""
    with Jobserver(method, 1) as js:
        future = js.submit(ignoring_signals, args=(gate,))
        gate.await_entered(1)
        assert future.wait(0.1, signal=signal.SIGTERM) is False
        assert future.wait(PATIENCE, signal=signal.SIGKILL) is True
        with pytest.raises(SubmissionDied):
            future.result(0)


@pytest.mark.contract("F25", "S18")
def test_many_deaths_among_results(gate: Gate) -> None:
    """Deaths and results side by side: each Future gets its own, no slot is lost."""
    js = Jobserver("fork", 3)
    jobs = [(identity, n) if n % 2 else (hard_exit, n) for n in range(20)]
    futures = [js.submit(job, args=(n,)) for job, n in jobs]
    for number, future in enumerate(futures):
        if number % 2:
            assert future.result(PATIENCE) == number
        else:
            with pytest.raises(SubmissionDied) as caught:
                future.result(PATIENCE)
            assert caught.value.exitcode == number

    assert free_slots(js, gate) == 3


# Things left behind


@pytest.mark.contract("F9", "S18")
@by_method("first", [3, 0])
def test_job_that_closes_all_descriptors(method: str, first: int) -> None:
    """Without its channel a job cannot answer: SubmissionDied, and the slot comes back."""
    with Jobserver(method, 1) as js:
        future = js.submit(close_descriptors, args=(first,))
        with pytest.raises(SubmissionDied):
            future.result(PATIENCE)
        assert js.submit(identity, args=(1,), timeout=PATIENCE).result(PATIENCE) == 1


@pytest.mark.contract("J4", "F9", "N5")
def test_job_without_channel_keeps_its_slot_while_it_runs(gate: Gate) -> None:
    """A job that closes everything but runs on still counts as running."""
    js = Jobserver("fork", 1)
    future = js.submit(close_descriptors, args=(3, gate))
    gate.await_entered(1)
    with pytest.raises(Blocked):
        js.submit(nothing, timeout=0.1)
    gate.open()

    with pytest.raises(SubmissionDied):
        future.result(PATIENCE)
    assert js.submit(identity, args=(1,), timeout=PATIENCE).result(PATIENCE) == 1


@pytest.mark.contract("F6")
@by_method("how", ["descriptor", "object", "none", "broken"])
def test_job_that_closes_its_streams(method: str, how: str) -> None:
    """A job without usable stdout and stderr still gives its result."""
    with Jobserver(method, 1) as js:
        assert js.submit(close_streams, args=(how,)).result(PATIENCE) == "closed"


@pytest.mark.contract("F9", "S15")
def test_death_while_submit_waits(gate: Gate) -> None:
    """The death of the job that holds the slot wakes a submit that waits for it."""
    js = Jobserver("fork", 1)
    victim = js.submit(gate.enter)
    (worker,) = gate.await_entered(1)
    killer = threading.Timer(0.05, os.kill, (worker, signal.SIGKILL))
    killer.start()
    before = time.monotonic()

    assert js.submit(pid, timeout=PATIENCE).result(PATIENCE) != worker
    assert time.monotonic() - before < 5
    killer.join()
    with pytest.raises(SubmissionDied):
        victim.result(0)
    settle(js)
