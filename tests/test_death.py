# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs that end badly or leave something behind, and callers that interfere."""

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
    await_end,
    chain_text,
    die,
    fail,
    free_slots,
    hard_exit,
    has_ended,
    identity,
    nothing,
    pid,
    run_program,
    settle,
    soft_exit,
    wait_until,
    worker_pid,
)
from jobs import (
    change_directory,
    change_much,
    close_descriptors,
    close_streams,
    exec_program,
    grandchild,
    ignoring_signals,
    look_around,
    run_daemon_thread,
    stop_other_threads_from_finishing,
)

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
@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_hard_exit(method: str, status: int) -> None:
    """os._exit is a SubmissionDied with the exit status, 0 included."""
    with Jobserver(method, 1) as js:
        expect_death(js, status, hard_exit, status)


@pytest.mark.contract("F9", "F10")
@pytest.mark.parametrize(("status", "exitcode"), [(None, 0), (0, 0), (3, 3), ("a reason", 1)])
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
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
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
@pytest.mark.parametrize("first", [3, 0])
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
@pytest.mark.parametrize("how", ["object", "descriptor", "none", "broken"])
def test_job_that_closes_its_streams(method: str, how: str) -> None:
    """A job without usable stdout and stderr still gives its result."""
    with Jobserver(method, 1) as js:
        assert js.submit(close_streams, args=(how,)).result(PATIENCE) == "closed"


@pytest.mark.contract("F6", "F26", "S18")
def test_grandchild_that_holds_the_channel(method: str, gate: Gate, tmp_path: Path) -> None:
    """A process that the job leaves behind delays neither the result nor the slot."""
    with Jobserver(method, 1) as js:
        future = js.submit(grandchild, args=(gate, str(tmp_path / "pid"), "answer"))
        assert future.result(PATIENCE) == "answer"
        orphan = int((tmp_path / "pid").read_text())
        assert not has_ended(orphan)
        assert js.submit(identity, args=(1,), timeout=0).result(PATIENCE) == 1
        gate.open()
        await_end(orphan)


@pytest.mark.contract("F9", "F10", "S18")
def test_death_with_a_grandchild_that_holds_the_channel(
    method: str, gate: Gate, tmp_path: Path
) -> None:
    """A job's death is seen although a grandchild keeps its channel open."""
    with Jobserver(method, 1) as js:
        future = js.submit(grandchild, args=(gate, str(tmp_path / "pid"), "die"))
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        assert caught.value.exitcode == 23
        orphan = int((tmp_path / "pid").read_text())
        assert not has_ended(orphan)
        assert js.submit(identity, args=(1,), timeout=0).result(PATIENCE) == 1
        gate.open()
        await_end(orphan)


@pytest.mark.contract("F6")
def test_daemon_thread_left_running(method: str) -> None:
    """A daemon thread that never stops does not keep the result back."""
    with Jobserver(method, 1) as js:
        assert js.submit(run_daemon_thread).result(PATIENCE) == "left a daemon"


@pytest.mark.contract("F5", "F9")
def test_thread_that_never_ends(method: str, gate: Gate) -> None:
    """A job whose other thread never ends can be cancelled."""
    with Jobserver(method, 1) as js:
        future = js.submit(stop_other_threads_from_finishing, args=(gate,))
        gate.await_entered(1)
        assert future.wait(0.1) is False
        assert future.wait(PATIENCE, signal=signal.SIGKILL) is True


@pytest.mark.contract("S2", "S6")
def test_changes_stay_in_the_job(method: str, tmp_path: Path) -> None:
    """Directory, umask, limits and modules that a job changes are not changed elsewhere."""
    here = os.getcwd()
    with Jobserver(method, 1) as js:
        before = js.submit(look_around).result(PATIENCE)
        assert js.submit(change_directory, args=(str(tmp_path),)).result(PATIENCE) == str(tmp_path)
        js.submit(change_much, args=(str(tmp_path),)).result(PATIENCE)
        assert js.submit(look_around).result(PATIENCE) == before
    assert os.getcwd() == here


@pytest.mark.contract("S2")
def test_jobs_start_in_the_callers_directory(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job starts in the caller's working directory of the moment, as a subprocess does."""
    with Jobserver(method, 1) as js:
        js.submit(nothing).wait(PATIENCE)
        monkeypatch.chdir(tmp_path)
        assert js.submit(os.getcwd).result(PATIENCE) == str(tmp_path)


# Callers that interfere


@pytest.mark.contract("F1", "F6", "S18")
def test_caller_that_reaps_our_children(method: str, gate: Gate) -> None:
    """When other code has reaped the worker, its result arrives all the same."""
    with Jobserver(method, 2) as js:
        future = js.submit(identity, args=("kept",))
        if method == "forkserver":
            # The worker is nobody's child here.
            await_end(worker_pid(future))
        else:
            os.waitpid(worker_pid(future), 0)
        assert future.result(PATIENCE) == "kept"
        dead = js.submit(hard_exit, args=(4,))
        if method != "forkserver":
            os.waitpid(worker_pid(dead), 0)
        with pytest.raises(SubmissionDied) as caught:
            dead.result(PATIENCE)
        assert caught.value.exitcode in (4, None)
        assert free_slots(js, gate) == 2


WAIT_PROGRAM = """
import os, signal, sys
from jobserver import Jobserver, SubmissionDied
from helpers import PATIENCE, free_slots, Gate, hard_exit, worker_pid
from pathlib import Path

if __name__ == "__main__":
    method, how, directory = sys.argv[1:]
    if how == "SIG_IGN":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    js = Jobserver(method, 2)
    first = Path(directory, "first")
    first.mkdir()
    gate = Gate(first)
    good = js.submit(gate.enter)
    worker = worker_pid(good)
    bad = js.submit(hard_exit, args=(4,))
    gate.open()
    if how == "wait" and method != "forkserver":
        while os.wait()[0] != worker:
            pass
    assert good.result(PATIENCE) == worker
    try:
        bad.result(PATIENCE)
    except SubmissionDied as died:
        assert died.exitcode in (4, None), died.exitcode
    killed = js.submit(Gate(Path(directory)).enter)
    assert killed.wait(PATIENCE, signal=signal.SIGKILL)
    other = Path(directory, "other")
    other.mkdir()
    print(free_slots(js, Gate(other)))
"""


@pytest.mark.contract("F1", "F6", "F9", "S18")
@pytest.mark.parametrize("how", ["wait", "SIG_IGN"])
def test_caller_that_waits_for_anyone(method: str, tmp_path: Path, how: str) -> None:
    """os.wait() in a loop, or SIGCHLD ignored: nothing hangs, nothing is lost."""
    script = tmp_path / "program.py"
    script.write_text(WAIT_PROGRAM)
    gate = tmp_path / "gate"
    gate.mkdir()

    done = run_program([str(script), method, how, str(gate)])

    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)


ZYGOTE_PROGRAM = """
import os, signal, sys
from pathlib import Path
from jobserver import Jobserver, SubmissionDied
from helpers import PATIENCE, Gate, await_end, free_slots, identity

if __name__ == "__main__":
    js = Jobserver("forkserver", 2)
    server = js.submit(os.getppid).result(PATIENCE)
    gate = Gate(Path(sys.argv[1]))
    running = js.submit(gate.enter)
    (worker,) = gate.await_entered(1)
    os.kill(server, signal.SIGKILL)
    await_end(server)
    assert js.submit(identity, args=(5,)).result(PATIENCE) == 5
    assert js.submit(os.getppid).result(PATIENCE) != server
    gate.open()
    assert running.result(PATIENCE) == worker
    other = Path(sys.argv[1], "other")
    other.mkdir()
    print(free_slots(js, Gate(other)))
"""


@pytest.mark.contract("S2", "S18", "F25")
def test_death_of_the_fork_server(tmp_path: Path) -> None:
    """When the process that forks workers is killed, running jobs finish and new ones start."""
    script = tmp_path / "program.py"
    script.write_text(ZYGOTE_PROGRAM)
    gate = tmp_path / "gate"
    gate.mkdir()

    done = run_program([str(script), str(gate)])

    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)


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
