# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Programs that end while jobs are in flight, in every way a program can end."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
from helpers import (
    PATIENCE,
    Gate,
    has_ended,
    run_program,
    session_members,
    started_program,
    wait_until,
)

if TYPE_CHECKING:
    from pathlib import Path

#: A program with a job that takes a moment, then the end that the test chooses.
PROGRAM = """
import gc, os, signal, sys, threading, time
from pathlib import Path
from jobserver import Jobserver
from helpers import Gate, identity, nothing, touch
from jobs_ending import slow_touch

method, directory = sys.argv[1:3]

def main():
    js = Jobserver(method, 2)
    future = js.submit(slow_touch, args=(os.path.join(directory, "begun"),
                                         os.path.join(directory, "done")))
    while not os.path.exists(os.path.join(directory, "begun")):
        time.sleep(0.001)
    END

if __name__ == "__main__":
    main()
"""

ENDS = {
    "return": "return",
    "dropped": "del js, future; gc.collect()",
    "global": "globals().update(js=js, future=future)",
    "with": "js.__enter__(); js.__exit__(None, None, None)",
    "sys.exit": "sys.exit(0)",
    "callback": "future.when_done(nothing)",
    "thread": "threading.Thread(target=future.result).start()",
    "daemon": "threading.Thread(target=future.result, daemon=True).start(); time.sleep(0.05)",
    "submit": "threading.Thread(target=lambda: [js.submit(nothing) for _ in range(4)]).start()",
    "map": "m = js.map(identity, ((n,) for n in range(9)), buffersize=2); next(m)",
}


def program(tmp_path: Path, end: str) -> str:
    """Write the program with its end."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("END", end))
    return str(script)


@pytest.mark.contract("H3", "F26")
@pytest.mark.parametrize("end", list(ENDS))
def test_jobs_finish_when_the_program_ends(tmp_path: Path, end: str) -> None:
    """At the interpreter's exit jobs in flight finish, as concurrent.futures has it; no noise."""
    done = run_program([program(tmp_path, ENDS[end]), "fork", str(tmp_path)])

    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert (tmp_path / "done").exists()


@pytest.mark.contract("H3", "F26")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("end", ["return", "dropped", "global"])
def test_jobs_finish_with_other_methods(tmp_path: Path, method: str, end: str) -> None:
    """The same under spawn and forkserver, whose server ends with the program."""
    with started_program([program(tmp_path, ENDS[end]), method, str(tmp_path)]) as process:
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, err, process.returncode) == ("", "", 0)
        assert (tmp_path / "done").exists()
        wait_until(lambda: not session_members(process.pid), "all processes to end")


@pytest.mark.contract("H3")
@pytest.mark.parametrize(
    ("end", "status", "last"),
    [("sys.exit(7)", 7, ""), ("raise LookupError('the end')", 1, "LookupError: the end\n")],
)
def test_exit_status_is_kept(tmp_path: Path, end: str, status: int, last: str) -> None:
    """Jobs in flight change neither the exit status nor what is said."""
    done = run_program([program(tmp_path, end), "fork", str(tmp_path)])

    assert done.returncode == status
    assert done.stderr.count("Traceback") == bool(last)
    assert done.stderr.endswith(last)
    assert (tmp_path / "done").exists()


@pytest.mark.contract("H3", "F26")
@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_sudden_end(tmp_path: Path, method: str, end: str) -> None:
    """After os._exit or SIGKILL the running job finishes by itself, and no process stays."""
    with started_program([program(tmp_path, end), method, str(tmp_path)]) as process:
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, err) == ("", "")
        assert process.returncode == (3 if "_exit" in end else -signal.SIGKILL)
        wait_until((tmp_path / "done").exists, "the job to finish")
        wait_until(lambda: not session_members(process.pid), "all processes to end")


@pytest.mark.contract("H3")
def test_idle_program_ends_at_once(tmp_path: Path, method: str) -> None:
    """A program whose jobs have all finished ends without delay, and so does its server."""
    text = (
        "from jobserver import Jobserver\n"
        "from helpers import identity\n"
        "if __name__ == '__main__':\n"
        f"    js = Jobserver({method!r}, 1)\n"
        "    print(js.submit(identity, args=(1,)).result())\n"
    )
    script = tmp_path / "program.py"
    script.write_text(text)
    with started_program([str(script)]) as process:
        assert process.communicate(timeout=PATIENCE) == ("1\n", "")
        wait_until(lambda: not session_members(process.pid), "all processes to end")


PROCESS = """
import multiprocessing, signal, sys
from jobserver import Blocked, Jobserver
from helpers import die, identity

def use(js):
    print(js.submit(identity, args=(1,), timeout=0).result())
    stopped = js.submit(die, args=(signal.SIGSTOP,), timeout=0)
    try:
        js.submit(identity, args=(2,), timeout=0)
    except Blocked:
        print("blocked")
    stopped.wait(signal=signal.SIGKILL)

if __name__ == "__main__":
    js = Jobserver("fork", 1)
    process = multiprocessing.get_context(sys.argv[1]).Process(target=use, args=(js,))
    process.start()
    process.join()
    print(process.exitcode, js.submit(identity, args=(3,)).result(), flush=True)
"""


@pytest.mark.contract("H7", "H12")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_of_multiprocessing_with_a_jobserver(tmp_path: Path, method: str) -> None:
    """A Process that got a Jobserver shares its slots, and ends quietly when its modules go."""
    script = tmp_path / "program.py"
    script.write_text(PROCESS)

    done = run_program([str(script), method])

    assert (done.stdout, done.stderr) == ("1\nblocked\n0 3\n", "")


@pytest.mark.contract("H3", "F9")
def test_gated_job_can_be_killed_at_exit(tmp_path: Path, gate: Gate) -> None:
    """While the exit waits for a job, ending that job ends the program."""
    text = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jobserver import Jobserver\n"
        "from helpers import Gate\n"
        "js = Jobserver('fork', 1)\n"
        "future = js.submit(Gate(Path(sys.argv[1])).enter)\n"
    )
    with started_program(["-c", text, gate.directory]) as process:
        (worker,) = gate.await_entered(1)
        assert process.poll() is None
        os.kill(worker, signal.SIGKILL)
        out, err = process.communicate(timeout=PATIENCE)
        assert (out, err, process.returncode) == ("", "", 0)


@pytest.mark.contract("F26", "H6")
def test_job_that_ends_before_its_children(method: str, tmp_path: Path) -> None:
    """A job that returns while a job of its own runs: the child finishes, the result arrives."""
    text = (
        "import sys\n"
        "from jobserver import Jobserver\n"
        "from jobs_ending import leave_child\n"
        "from helpers import identity\n"
        "if __name__ == '__main__':\n"
        f"    with Jobserver({method!r}, 2) as js:\n"
        "        print(js.submit(leave_child, args=(js, *sys.argv[1:])).result())\n"
        "        for n in range(2):\n"
        "            print(js.submit(identity, args=(n,)).result())\n"
    )
    script = tmp_path / "program.py"
    script.write_text(text)

    done = run_program([str(script), str(tmp_path / "begun"), str(tmp_path / "done")])

    assert (done.stdout, done.stderr) == ("left\n0\n1\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.contract("F26", "H6", "S18")
def test_worker_killed_while_its_children_run(tmp_path: Path, gate: Gate, method: str) -> None:
    """When a job with a running child is killed, the child finishes and the program goes on."""
    text = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from jobserver import Jobserver, SubmissionDied\n"
        "from helpers import PATIENCE, Gate, await_end, free_slots, wait_until\n"
        "from jobs import nested_at_gate\n"
        "if __name__ == '__main__':\n"
        "    directory = Path(sys.argv[1])\n"
        "    gate = Gate(directory)\n"
        f"    js = Jobserver({method!r}, 3)\n"
        "    outer = js.submit(nested_at_gate, args=(js, gate))\n"
        "    (child,) = gate.await_entered(1)\n"
        "    assert outer.wait(PATIENCE, signal=signal.SIGKILL)\n"
        "    gate.open()\n"
        "    await_end(child)\n"
        "    try:\n"
        "        outer.result()\n"
        "    except SubmissionDied as died:\n"
        "        print(died.exitcode)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(text)
    with started_program([str(script), gate.directory]) as process:
        assert process.communicate(timeout=PATIENCE) == ("-9\n", "")
        assert process.returncode == 0
    assert has_ended(gate.entered()[0])
