# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Ctrl-C: whatever is interrupted, nothing is lost and the program decides how to go on."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    identity,
    process_state,
    run_program,
    session_members,
    started_program,
    wait_until,
)
from jobs_stuck import handler_of, stuck

from jobserver import Jobserver, SubmissionDied

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

PROGRAM = """
import os, sys, time
from pathlib import Path
from jobserver import Jobserver
from helpers import PATIENCE, Gate, free_slots, identity, nothing, settle

def block_in_submit(js, gate):
    js.submit(nothing)

def block_in_submit_with_timeout(js, gate):
    js.submit(nothing, timeout=60)

def block_in_wait(js, gate):
    running.wait()

def block_in_result(js, gate):
    running.result(60)

def block_in_done(js, gate):
    running.done(None)

def block_in_map(js, gate):
    for _ in js.map(Gate.enter, [(gate,), (gate,)]):
        pass

def block_in_callback(js, gate):
    soon = js.submit(nothing, consume=0)
    soon.when_done(time.sleep, 60)
    soon.wait()

def block_in_sleep_fn(js, gate):
    js.submit(nothing, sleep_fn=lambda: time.sleep(60))

def block_in_the_sleep_of_sleep_fn(js, gate):
    js.submit(nothing, sleep_fn=lambda: 60)

if __name__ == "__main__":
    method, where, directory = sys.argv[1:]
    first, second = Path(directory, "first"), Path(directory, "second")
    first.mkdir()
    second.mkdir()
    gate = Gate(first)
    js = Jobserver(method, 1)
    running = js.submit(gate.enter)
    gate.await_entered(1)
    try:
        print("ready", flush=True)
        globals()["block_in_" + where](js, gate)
        print("not interrupted")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    gate.open()
    assert running.wait(PATIENCE)
    print("value" if os.environ.get("WHOLE_GROUP") or running.result(0) else None)
    settle(js)
    assert js.submit(identity, args=(3,)).result(PATIENCE) == 3
    print(free_slots(js, Gate(second)))
"""

PLACES = [
    "submit",
    "submit_with_timeout",
    "wait",
    "result",
    "done",
    "map",
    "callback",
    "sleep_fn",
    "the_sleep_of_sleep_fn",
]


def await_blocked(process: subprocess.Popen[str]) -> None:
    """Wait until a program that has said so really sleeps in the call that blocks."""
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    asleep = 0

    def sleeps() -> bool:
        nonlocal asleep
        asleep = asleep + 1 if process_state(process.pid) == "S" else 0
        return asleep > 10

    wait_until(sleeps, "the program to block")


def interrupt(
    script: Path, arguments: list[str], whole_group: bool = False
) -> tuple[str, str, int]:
    """Run a program, press Ctrl-C when it blocks; what it says and how it ends."""
    environment = {"WHOLE_GROUP": "1"} if whole_group else {}
    with started_program([str(script), *arguments], env=environment) as process:
        await_blocked(process)
        if whole_group:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=2 * PATIENCE)
        return out, err, process.returncode


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The script that blocks in a named place."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    return script


@pytest.mark.contract("S18", "F22", "S3", "F6")
@pytest.mark.parametrize("where", PLACES)
def test_interrupt(program: Path, tmp_path: Path, where: str) -> None:
    """KeyboardInterrupt comes out of every blocking call; jobs run on and no slot is lost."""
    out, err, status = interrupt(program, ["fork", where, str(tmp_path)])

    assert err == ""
    assert out.splitlines() == ["interrupted", "value", "1"]
    assert status == 0


@pytest.mark.contract("S18")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("where", ["submit", "result"])
def test_interrupt_with_other_methods(
    program: Path, tmp_path: Path, method: str, where: str
) -> None:
    """The same under spawn and forkserver."""
    out, err, status = interrupt(program, [method, where, str(tmp_path)])

    assert err == ""
    assert out.splitlines() == ["interrupted", "value", "1"]
    assert status == 0


@pytest.mark.contract("S18", "F9")
@pytest.mark.parametrize("where", ["submit", "result", "map"])
def test_interrupt_of_the_whole_group(
    program: Path, tmp_path: Path, method: str, where: str
) -> None:
    """Ctrl-C on a terminal reaches workers too: those die, the program and its server go on."""
    out, err, status = interrupt(program, [method, where, str(tmp_path)], whole_group=True)

    assert out.splitlines() == ["interrupted", "value", "1"]
    assert err.count("Traceback") == 0
    assert status == 0


@pytest.mark.contract("F3", "F9")
@pytest.mark.parametrize("tasks", [1, None], ids=["fresh", "warm"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_interrupt_while_a_worker_imports(
    method: str, tasks: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT ends a worker that has yet to import its job, also inside a weak reference's call."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or it may be ignored
    try:
        with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
            assert js.submit(identity, args=(1,)).result(PATIENCE) == 1  # the server is there
            monkeypatch.setenv("STUCK_IN", str(tmp_path))
            # Another handle: a new worker, which imports that module.
            with Jobserver(method, 1, max_tasks_per_child=tasks) as other:
                future = other.submit(stuck)
                wait_until((tmp_path / "stuck").exists, "the import")
                assert future.wait(PATIENCE, signal=signal.SIGINT)
                with pytest.raises(SubmissionDied):
                    future.result()
                monkeypatch.delenv("STUCK_IN")
                # The handler of a job is that of any program.
                handler = other.submit(handler_of, args=(signal.SIGINT,)).result(PATIENCE)
                assert handler == "default_int_handler"
    finally:
        signal.signal(signal.SIGINT, before)
        (tmp_path / "go on").touch()


UNCAUGHT = """
import sys
from pathlib import Path
from jobserver import Jobserver
from helpers import Gate

if __name__ == "__main__":
    gate = Gate(Path(sys.argv[2]))
    with Jobserver(sys.argv[1], 2) as js:
        futures = [js.submit(gate.enter) for _ in range(2)]
        gate.await_entered(2)
        print("ready", flush=True)
        futures[0].result()
"""


@pytest.mark.contract("S18", "H3")
def test_uncaught_interrupt_ends_the_program(method: str, tmp_path: Path, gate: Gate) -> None:
    """Ctrl-C that nobody handles ends the program and its workers, with one traceback."""
    script = tmp_path / "program.py"
    script.write_text(UNCAUGHT)
    with started_program([str(script), method, gate.directory]) as process:
        await_blocked(process)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        # As for any Python program: status 130 in a shell.
        assert process.returncode == -signal.SIGINT
        assert err.count("Traceback (most recent call last)") == 1
        assert err.count("KeyboardInterrupt") == 1
        wait_until(lambda: not session_members(process.pid), "all processes to end")


STORM = """
import os, random, signal, sys
from pathlib import Path
from jobserver import Jobserver
from helpers import Gate, free_slots, identity, nothing, rested_fds

def storm(js, rounds):
    caught = 0
    for number in range(rounds):
        found = set()
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 8e-3))
            while True:
                # Not an assert: from Python 3.12 on the jump back after a condition that ends a
                # loop is outside of the try, and that is where handlers run.
                future = js.submit(identity, args=(number,))
                found.add(future.result())
        except KeyboardInterrupt:
            caught += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert found <= {number}
    return caught

def interrupt(signum, frame):
    raise KeyboardInterrupt

if __name__ == "__main__":
    method, rounds, seed, directory, tasks = sys.argv[1:]
    random.seed(int(seed))
    signal.signal(signal.SIGALRM, interrupt)
    js = Jobserver(method, 2, max_tasks_per_child=None if tasks == "warm" else 1)
    js.submit(nothing).result()
    before = rested_fds(js)
    assert storm(js, int(rounds)) == int(rounds)
    grown = rested_fds(js) - before
    print(free_slots(js, Gate(Path(directory))), grown)
"""


@pytest.fixture(params=["fresh", "warm"])
def storm(
    request: pytest.FixtureRequest, tmp_path: Path, gate: Gate, method: str
) -> Callable[[int, int], None]:
    """Runs the storm: so many rounds, from a seed."""

    def run(rounds: int, seed: int) -> None:
        script = tmp_path / "program.py"
        script.write_text(STORM)
        arguments = [str(script), method, str(rounds), str(seed), gate.directory, request.param]
        done = run_program(arguments, timeout=300)
        assert (done.stdout, done.stderr) == ("2 0\n", "")

    return run


@pytest.mark.contract("S18")
def test_storm_of_interrupts(storm: Callable[[int, int], None], method: str) -> None:
    """Interrupts at random moments of submit and result lose no slot and no descriptor."""
    storm(20 if method == "spawn" else 100, 0)


EXECUTORS = """
import gc, random, signal, sys
from jobserver import Jobserver, JobserverExecutor
from helpers import PATIENCE, identity, steady_fds

class Interrupted(BaseException):
    pass

def interrupt(signum, frame):
    raise Interrupted

if __name__ == "__main__":
    method, rounds, seed = sys.argv[1:]
    random.seed(int(seed))
    signal.signal(signal.SIGALRM, interrupt)
    js = Jobserver(method, 2)
    with JobserverExecutor(js) as executor:
        executor.submit(identity, 1).result()
    before = steady_fds(js)
    for _ in range(int(rounds)):
        executor = None
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 8e-3))
            while True:
                executor = JobserverExecutor(js)
                futures = [executor.submit(identity, number) for number in range(3)]
                assert [future.result() for future in futures] == [0, 1, 2]
                assert list(executor.map(identity, range(2))) == [0, 1]
                executor.shutdown()
        except Interrupted:
            pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        if executor is not None:
            if not executor._engine.stopping:
                assert executor.submit(identity, 5).result(PATIENCE) == 5
            executor.shutdown()
    del executor
    gc.collect()
    print(steady_fds(js) - before, js._shared.slots.free())
"""


@pytest.mark.contract("E5", "S18")
def test_storm_of_interrupts_on_executors(tmp_path: Path) -> None:
    """Interrupts at random moments of an executor's calls leave it usable, and lose nothing."""
    script = tmp_path / "program.py"
    script.write_text(EXECUTORS)

    done = run_program([str(script), "fork", "60", "0"])

    assert (done.stdout, done.stderr) == ("0 2\n", "")


WAITS = """
import random, signal, sys
from jobserver import JobserverExecutor
from helpers import PATIENCE, Gate

class Interrupted(BaseException):
    pass

def interrupt(signum, frame):
    global armed
    if armed:
        armed = False
        raise Interrupted

if __name__ == "__main__":
    gate = Gate(sys.argv[1])
    random.seed(0)
    signal.signal(signal.SIGALRM, interrupt)
    with JobserverExecutor(1, "fork") as executor:
        future = executor.submit(gate.enter)
        for number in range(2000):
            wait = future.exception if number % 2 else future.result
            armed = True
            try:
                # Again and again, as CPython does not hear a signal just before a blocking call.
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 6e-5), 1e-2)
                wait()
            except Interrupted:
                pass
        signal.setitimer(signal.ITIMER_REAL, 0)
        gate.open()
        assert [future.result(PATIENCE)] == gate.entered()
    print("done")
"""


@pytest.mark.contract("E5")
def test_interrupts_come_out_of_waiting_as_they_are(tmp_path: Path, gate: Gate) -> None:
    """What a handler raises while a future is waited for comes through, and nothing else."""
    script = tmp_path / "program.py"
    script.write_text(WAITS)

    done = run_program([str(script), gate.directory])

    assert (done.stdout, done.stderr) == ("done\n", "")


@pytest.mark.slow
@pytest.mark.contract("E5", "S18")
@pytest.mark.parametrize("seed", range(1, 3))
def test_long_storm_of_interrupts_on_executors(tmp_path: Path, method: str, seed: int) -> None:
    """The same for a long time."""
    script = tmp_path / "program.py"
    script.write_text(EXECUTORS)

    rounds = "150" if method == "spawn" else "1500"
    done = run_program([str(script), method, rounds, str(seed)], timeout=300)

    assert (done.stdout, done.stderr) == ("0 2\n", "")


@pytest.mark.slow
@pytest.mark.contract("S18")
@pytest.mark.parametrize("seed", range(1, 5))
def test_long_storm_of_interrupts(
    storm: Callable[[int, int], None], method: str, seed: int
) -> None:
    """The same for a long time."""
    storm(400 if method == "spawn" else 4000, seed)
