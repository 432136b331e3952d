# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What jobs leave behind, and callers that interfere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_end,
    free_slots,
    hard_exit,
    has_ended,
    identity,
    nothing,
    program_environment,
    run_program,
    worker_pid,
)
from jobs_ending import (
    change_directory,
    change_much,
    fork_and_end,
    grandchild,
    inheritable,
    inheritable_below,
    look_around,
    run_daemon_thread,
    stop_other_threads_from_finishing,
)

from jobserver import Jobserver, SubmissionDied


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


@pytest.mark.fresh("what a job changes in its process stays until that ends")
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


@pytest.mark.fresh("waits for workers to end")
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


@pytest.mark.contract("F6", "W1")
@pytest.mark.parametrize("tasks", [1, None], ids=["fresh", "warm"])
def test_copy_that_a_job_makes_of_itself(
    method: str, tasks: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """A child that a job forks ends with the status that it asks for, and answers nothing."""
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        ends = [js.submit(fork_and_end, args=(how,)) for how in ("return", "exit", "raise")]
        assert [future.result(PATIENCE) for future in ends] == [0, 4, 1]
    if method != "forkserver":  # whose server may have started with another stderr
        assert capfd.readouterr().err.count("LookupError: of the child") == 1


@pytest.mark.contract("S18", "W1")
@pytest.mark.parametrize("tasks", [1, None], ids=["fresh", "warm"])
def test_commands_inherit_no_descriptor(method: str, tasks: int | None) -> None:
    """What a job starts by exec, or its caller does, finds no descriptor of ours."""
    before = inheritable()
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        for _ in range(3):  # a later job brings its slot along
            at_work = js.submit(inheritable_below, args=(js,)).result(PATIENCE)
            assert set(inheritable()) <= set(before)
            # Under fork a job has what its caller has.
            assert [found for found in at_work if found not in before] == []


CLOSED = """
import contextlib, os, sys
from pathlib import Path
from jobserver import Jobserver

def put_out():
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            os.write(fd, b"much that is no token and no answer")
    os.system("echo out; echo err >&2")

method, tasks, how, report = sys.argv[1:]

def below(js, depth):
    put_out()
    if method == "fork" and how == "before":
        os.fstat(LOG)
    return 1 + (js.submit(below, args=(js, depth - 1)).result() if depth else 0)

LOG = 0
if __name__ == "__main__":
    if how == "later":
        os.closerange(0, 3)
    else:
        assert os.open(report, os.O_RDONLY) == LOG  # a file of the program's own
    try:
        js = Jobserver(method, 1, max_tasks_per_child=eval(tasks))
        found = [js.submit(below, args=(js, 3)).result() for _ in range(3)]
        found.append(js._shared.slots.free())
        found += js.map(abs, [(-n,) for n in range(5)], chunksize="auto")
        if how == "before":
            found.append(os.read(LOG, 9))
    except BaseException as error:
        found = repr(error)
    Path(report + ".told").write_text(f"{found}")
"""


@pytest.mark.contract("S2", "F6", "W1", "N5")
@pytest.mark.parametrize(("tasks", "how"), [("1", "before"), ("None", "later")])
def test_program_without_streams(method: str, tasks: str, how: str, tmp_path: Path) -> None:
    """Where stdin, stdout and stderr are closed, nothing of ours takes their numbers."""
    script, report = tmp_path / "program.py", tmp_path / "report"
    script.write_text(CLOSED)
    report.write_text("untouched")
    command = [sys.executable, str(script), method, tasks, how, str(report)]
    with_streams = ["sh", "-c", 'exec "$@"', "sh", *command]
    if how == "before":
        with_streams[2] += " <&- >&- 2>&-"

    subprocess.run(with_streams, env=program_environment(), timeout=60, check=True)

    expected = [4, 4, 4, 1, 0, 1, 2, 3, 4, *([b"untouched"] if how == "before" else [])]
    assert (tmp_path / "report.told").read_text() == str(expected)
