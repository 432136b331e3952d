# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What surrounds a job: env, preexec_fn, the process itself and its streams."""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    fail,
    free_slots,
    getenv,
    lines,
    nothing,
    run_program,
    touch,
)
from jobs import (
    Appender,
    NoteEnvironment,
    Wrapper,
    environment_of_a_program,
    finalizer,
    multiprocessing_child,
    note_in,
    raising_entry,
    random_number,
    refuse,
    signal_state,
    threads_left,
)
from marks import by_method

from jobserver import Jobserver

if TYPE_CHECKING:
    from pathlib import Path

# env


@pytest.mark.contract("S6")
@pytest.mark.parametrize(
    "env",
    [
        {"JOBSERVER_T": "new", "JOBSERVER_GONE": None},
        [("JOBSERVER_T", "new"), ("JOBSERVER_GONE", None)],
        iter([("JOBSERVER_T", "new"), ("JOBSERVER_GONE", None)]),
    ],
    ids=["mapping", "pairs", "iterator"],
)
def test_env(monkeypatch: pytest.MonkeyPatch, env: Any) -> None:
    """env sets and, with None, unsets variables of the worker, and of nobody else."""
    monkeypatch.setenv("JOBSERVER_T", "old")
    monkeypatch.setenv("JOBSERVER_GONE", "here")
    monkeypatch.setenv("JOBSERVER_KEPT", "kept")
    names = ("JOBSERVER_T", "JOBSERVER_GONE", "JOBSERVER_KEPT")
    js = Jobserver("fork", 1)

    assert js.submit(getenv, args=names, env=env).result(PATIENCE) == ["new", None, "kept"]
    assert getenv(*names) == ["old", "here", "kept"]
    assert js.submit(getenv, args=names).result(PATIENCE) == ["old", "here", "kept"]


@pytest.mark.contract("S6")
def test_env_with_every_method(method: str) -> None:
    """env holds for one job, not for the next, and unsetting what is not set is no error."""
    changes = {"JOBSERVER_T": "a=b c", "JOBSERVER_NEVER_SET": None, "JOBSERVER_EMPTY": ""}
    with Jobserver(method, 1) as js:
        first = js.submit(getenv, args=tuple(changes), env=changes).result(PATIENCE)
        second = js.submit(getenv, args=tuple(changes)).result(PATIENCE)

    assert first == ["a=b c", None, ""]
    assert second == [None, None, None]


@pytest.mark.contract("S6")
def test_env_reaches_programs(method: str) -> None:
    """env is the process's real environment: programs that the job starts see it."""
    with Jobserver(method, 1, env={"JOBSERVER_T": "outside"}) as js:
        assert js.submit(environment_of_a_program).result(PATIENCE) == "outside"


@pytest.mark.contract("S6")
def test_caller_s_environment_at_the_call(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job sees the caller's environment as it is at the call, as a subprocess would."""
    with Jobserver(method, 1) as js:
        js.submit(nothing).wait(PATIENCE)
        monkeypatch.setenv("JOBSERVER_T", "set later")
        assert js.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == ["set later"]


@pytest.mark.contract("S6", "S8")
def test_env_is_there_for_preexec(method: str, tmp_path: Path) -> None:
    """env has been applied when preexec_fn is called."""
    with Jobserver(method, 1) as js:
        js.submit(
            nothing, env={"JOBSERVER_T": "early"}, preexec_fn=NoteEnvironment(tmp_path / "log")
        ).result(PATIENCE)

    assert lines(tmp_path / "log") == ["early"]


@pytest.mark.contract("S7", "S18")
@pytest.mark.parametrize(
    "env",
    [
        {"": "x"},
        {"A=B": "x"},
        {"=": "x"},
        {"A\0": "x"},
        {"A": "x\0"},
        {5: "x"},
        {None: "x"},
        {b"A": "x"},
        {"A": 5},
        {"A": b"x"},
        {"A": True},
        {"\ud800": "x"},
        {"A": "\ud800"},
        [("A",)],
        [("A", "b", "c")],
        [5],
        ["Ab"],
        "A=b",
        5,
    ],
    ids=repr,
)
def test_bad_env(gate: Gate, env: Any) -> None:
    """Bad names and values are refused at the call, before a slot is taken, waiting or not."""
    js = Jobserver("fork", 1)
    running = js.submit(gate.enter)

    with pytest.raises((TypeError, ValueError)):
        js.submit(nothing, env=env)
    with pytest.raises((TypeError, ValueError)):
        js.submit(nothing, env=env, consume=0)

    gate.open()
    running.wait(PATIENCE)
    assert js.submit(nothing, timeout=0).wait(PATIENCE)


# preexec_fn


@pytest.mark.contract("S8")
def test_preexec(method: str, tmp_path: Path) -> None:
    """preexec_fn is called once, in the worker, before fn."""
    log = tmp_path / "log"
    with Jobserver(method, 1) as js:
        worker = js.submit(note_in, args=(str(log),), preexec_fn=Appender(log)).result(PATIENCE)

    assert lines(log) == [f"x {worker}", f"fn {worker}"]
    assert worker != os.getpid()


@pytest.mark.contract("S8")
def test_preexec_that_raises(method: str, tmp_path: Path, gate: Gate) -> None:
    """When preexec_fn raises, fn does not run and the Future raises that exception."""
    with Jobserver(method, 1) as js:
        future = js.submit(touch, args=(str(tmp_path / "ran"),), preexec_fn=refuse)
        with pytest.raises(LookupError, match="not today"):
            future.result(PATIENCE)
        assert free_slots(js, gate) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.contract("S9")
def test_context_manager(method: str, tmp_path: Path) -> None:
    """A context manager that preexec_fn returns is entered before fn and left after it."""
    log = tmp_path / "log"
    with Jobserver(method, 1) as js:
        worker = js.submit(note_in, args=(str(log),), preexec_fn=Wrapper(log)).result(PATIENCE)

    assert lines(log) == ["called", "entered", f"fn {worker}", "left"]


@pytest.mark.contract("S9")
def test_context_manager_sees_the_exception(method: str, tmp_path: Path) -> None:
    """fn's exception passes through the context manager to the Future."""
    log = tmp_path / "log"
    with Jobserver(method, 1) as js, pytest.raises(KeyError, match="k"):
        js.submit(fail, args=(KeyError, "k"), preexec_fn=Wrapper(log)).result(PATIENCE)

    assert lines(log) == ["called", "entered", "KeyError", "left"]


@pytest.mark.contract("S9")
def test_context_manager_may_suppress(method: str, tmp_path: Path) -> None:
    """When the context manager suppresses fn's exception, the result is None."""
    log = tmp_path / "log"
    with Jobserver(method, 1) as js:
        future = js.submit(fail, args=(KeyError, "k"), preexec_fn=Wrapper(log, suppress=True))
        assert future.result(PATIENCE) is None

    assert lines(log) == ["called", "entered", "KeyError", "left"]


@pytest.mark.contract("S9")
@by_method("answer", [5, "text", Wrapper, ()])
def test_other_answers_of_preexec(method: str, tmp_path: Path, answer: Any) -> None:
    """What preexec_fn returns means nothing unless it is a context manager, as in subprocess."""
    log = tmp_path / "log"
    with Jobserver(method, 1) as js:
        for handle in (js, js.replace(makeflags=True)):
            future = handle.submit(note_in, args=(str(log),), preexec_fn=Appender(log, "x", answer))
            worker = future.result(PATIENCE)
            assert lines(log)[-2:] == [f"x {worker}", f"fn {worker}"]


@pytest.mark.contract("S9")
def test_context_manager_that_fails(tmp_path: Path) -> None:
    """An exception from entering or leaving the context manager is the Future's."""
    js = Jobserver("fork", 1)
    leaving = Wrapper(tmp_path / "log", fail_at_exit=True)

    with pytest.raises(LookupError, match="no entry"):
        js.submit(touch, args=(str(tmp_path / "ran"),), preexec_fn=raising_entry).result(PATIENCE)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match="left badly"):
        js.submit(nothing, preexec_fn=leaving).result(PATIENCE)


# precedence


@pytest.mark.contract("S14", "J9")
def test_submit_overrides_the_handle(tmp_path: Path) -> None:
    """env, preexec_fn and sleep_fn given to submit replace the handle's; None keeps them."""
    log = tmp_path / "log"
    asked: list[str] = []
    js = Jobserver(
        "fork",
        1,
        env={"JOBSERVER_T": "handle", "JOBSERVER_U": "handle"},
        preexec_fn=Appender(log, "handle"),
        sleep_fn=lambda: asked.append("handle"),
    )
    names = ("JOBSERVER_T", "JOBSERVER_U")

    kept = js.submit(getenv, args=names, env=None, preexec_fn=None, sleep_fn=None)
    assert kept.result(PATIENCE) == ["handle", "handle"]
    other = js.submit(
        getenv,
        args=names,
        env={"JOBSERVER_T": "call"},
        preexec_fn=Appender(log, "call"),
        sleep_fn=lambda: asked.append("call"),
    )
    assert other.result(PATIENCE) == ["call", None]
    assert js.submit(getenv, args=names, env=()).result(PATIENCE) == [None, None]

    assert [line.split()[0] for line in lines(log)] == ["handle", "call", "handle"]
    assert asked == ["handle", "call", "handle"]


# the worker's process


@pytest.mark.contract("S2")
def test_random_numbers_differ(method: str) -> None:
    """Each worker has random numbers of its own."""
    with Jobserver(method, 1) as js:
        numbers = {js.submit(random_number).result(PATIENCE) for _ in range(3)}

    assert len(numbers) == 3


INPUT = """
import subprocess, sys
from jobserver import Jobserver
MADE_OF_IT

def read():
    command = [sys.executable, "-c", "import sys; print(sys.stdin.read())"]
    return sys.stdin.read(), subprocess.run(command, stdout=subprocess.PIPE).stdout

if __name__ == "__main__":
    with Jobserver(sys.argv[1], 1) as js:
        print(*js.submit(read).result())
    print(sys.stdin.read())
"""


@pytest.mark.contract("S2")
@pytest.mark.parametrize("made", ["", "sys.stdin = open(0)"])
def test_stdin_is_not_shared(method: str, made: str, tmp_path: Path) -> None:
    """A worker, and a command that it runs, read an empty stdin and leave the caller's alone."""
    script = tmp_path / "program.py"
    script.write_text(INPUT.replace("MADE_OF_IT", made))

    done = run_program([str(script), method], stdin="for the program")

    assert (done.stdout, done.stderr) == (" b'\\n'\nfor the program\n", "")


CLOSED = """
import sys
from jobserver import Jobserver
sys.stdin.close()

def read():
    return sys.stdin.read()

if __name__ == "__main__":
    with Jobserver(sys.argv[1], 1) as js:
        print(js.submit(read).result())
"""


@pytest.mark.contract("S2")
def test_stdin_that_main_has_closed(method: str, tmp_path: Path) -> None:
    """A worker reads an empty stdin also where the program has closed its own."""
    script = tmp_path / "program.py"
    script.write_text(CLOSED)

    done = run_program([str(script), method], stdin="for nobody")

    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.contract("S2")
def test_signals_are_as_in_a_new_process(method: str) -> None:
    """A worker starts with no signal blocked and with SIGINT as Python has it."""
    with Jobserver(method, 1) as js:
        assert js.submit(signal_state).result(PATIENCE) == ([], True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.contract("S2")
def test_children_of_multiprocessing(method: str) -> None:
    """A job may start multiprocessing processes of its own."""
    with Jobserver(method, 1) as js:
        assert js.submit(multiprocessing_child).result(PATIENCE) == "from the grandchild"


def name_of_a_child() -> str:
    """What multiprocessing would call the first process that this job starts."""
    return multiprocessing.get_context("fork").Process(target=print).name


@pytest.mark.contract("S2")
@pytest.mark.fresh("a worker that stays counts on")
def test_children_of_workers_have_names_of_their_own() -> None:
    """Forked workers are numbered, and the names of their processes begin with that number."""
    with Jobserver("fork", 1) as js:
        names = [js.submit(name_of_a_child).result(PATIENCE) for _ in range(3)]

    assert len(set(names)) == 3


@pytest.mark.contract("S2")
def test_finalizers_run(method: str, tmp_path: Path) -> None:
    """multiprocessing's finalizers have run when the result is there."""
    with Jobserver(method, 1) as js:
        js.submit(finalizer, args=(str(tmp_path / "done"),)).result(PATIENCE)
        assert (tmp_path / "done").exists()


@pytest.mark.contract("S2")
def test_threads_are_joined(method: str, tmp_path: Path) -> None:
    """Threads that a job leaves running end before its result is there; daemons do not count."""
    with Jobserver(method, 1) as js:
        assert js.submit(threads_left, args=(str(tmp_path / "done"),)).result(PATIENCE) == "left"
        assert (tmp_path / "done").exists()


@pytest.mark.contract("S2")
def test_every_submission_has_its_own_process(method: str, gate: Gate) -> None:
    """Two jobs at once have two processes, none of them the caller's."""
    with Jobserver(method, 2) as js:
        first, second = js.submit(gate.enter), js.submit(gate.enter)
        gate.open()
        assert len({first.result(PATIENCE), second.result(PATIENCE), os.getpid()}) == 3


STREAMS = """
import sys
from jobserver import Jobserver
from jobs import print_both

if __name__ == "__main__":
    sys.stdout.write("before ")
    with Jobserver({method!r}, 1) as js:
        js.submit(print_both).result()
    sys.stdout.write("after\\n")
"""


@pytest.mark.contract("S2")
def test_streams(method: str, tmp_path: Path) -> None:
    """What a job prints arrives once, unbuffered text of the caller is not repeated."""
    script = tmp_path / "program.py"
    script.write_text(STREAMS.format(method=method))

    done = run_program([str(script)], env={"PYTHONUNBUFFERED": ""})

    assert done.returncode == 0
    assert sorted(done.stdout.split()) == ["after", "before", "out"]
    assert done.stderr == "err"
