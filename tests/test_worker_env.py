# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What surrounds a job: env, preexec_fn, sleep_fn, the process itself and its streams."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    fail,
    free_slots,
    getenv,
    identity,
    lines,
    nothing,
    pid,
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
    read_stdin,
    refuse,
    signal_state,
    threads_left,
)

from jobserver import Blocked, Jobserver

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
        [("A",)],
        [("A", "b", "c")],
        [5],
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
def test_context_manager_that_fails(tmp_path: Path) -> None:
    """An exception from entering or leaving the context manager is the Future's."""
    js = Jobserver("fork", 1)
    leaving = Wrapper(tmp_path / "log", fail_at_exit=True)

    with pytest.raises(LookupError, match="no entry"):
        js.submit(touch, args=(str(tmp_path / "ran"),), preexec_fn=raising_entry).result(PATIENCE)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError, match="left badly"):
        js.submit(nothing, preexec_fn=leaving).result(PATIENCE)


# sleep_fn


@pytest.mark.contract("S10")
def test_sleep_fn(tmp_path: Path) -> None:
    """sleep_fn is called here; each number is slept, then it is asked again, until None."""
    js = Jobserver("fork", 1)
    answers = iter([0.05, 0, 0.1, None])
    asked: list[int] = []

    def sleep_fn() -> Any:
        asked.append(os.getpid())
        return next(answers)

    before = time.monotonic()
    future = js.submit(identity, args=(1,), sleep_fn=sleep_fn)
    elapsed = time.monotonic() - before

    assert future.result(PATIENCE) == 1
    assert asked == [os.getpid()] * 4
    assert 0.15 <= elapsed < 5


@pytest.mark.contract("S10")
def test_sleep_fn_is_asked_before_a_slot_is_taken(method: str) -> None:
    """While sleep_fn decides, the only slot is free for others."""
    with Jobserver(method, 1) as js:
        inside: list[int] = []

        def sleep_fn() -> None:
            inside.append(js.submit(identity, args=(5,), timeout=0).result(PATIENCE))

        assert js.submit(identity, args=(6,), sleep_fn=sleep_fn).result(PATIENCE) == 6
    assert inside == [5]


@pytest.mark.contract("S11", "S4")
@pytest.mark.parametrize("seconds", [3600, 1e300, math.inf, 10**400])
@pytest.mark.parametrize("consume", [0, 1])
def test_sleep_fn_cannot_outlast_the_timeout(seconds: float, consume: int, tmp_path: Path) -> None:
    """Asking for more sleep than the timeout leaves gives Blocked at the timeout."""
    js = Jobserver("fork", 1)
    before = time.monotonic()

    with pytest.raises(Blocked):
        js.submit(
            touch,
            args=(str(tmp_path / "ran"),),
            sleep_fn=lambda: seconds,
            timeout=0.2,
            consume=consume,
        )

    assert 0.15 <= time.monotonic() - before < 3
    js.submit(nothing).wait(PATIENCE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.contract("S10", "S11")
def test_sleep_fn_that_always_says_zero() -> None:
    """Zero for ever ends at the timeout, too."""
    js = Jobserver("fork", 1)

    with pytest.raises(Blocked):
        js.submit(nothing, sleep_fn=lambda: 0, timeout=0.1)
    with pytest.raises(Blocked):
        js.submit(nothing, sleep_fn=lambda: 1, timeout=0)
    assert js.submit(identity, args=(1,), sleep_fn=lambda: None, timeout=0).result(PATIENCE) == 1


@pytest.mark.contract("S12", "S18")
@pytest.mark.parametrize(
    "answer", [-1, -1e-9, math.nan, -math.inf, "1", b"1", [], object(), 1j], ids=repr
)
def test_bad_answers_of_sleep_fn(gate: Gate, answer: Any) -> None:
    """Any other answer is a ValueError, and no slot is lost."""
    js = Jobserver("fork", 1)

    with pytest.raises(ValueError):
        js.submit(nothing, sleep_fn=lambda: answer)
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S10", "S18")
def test_sleep_fn_that_raises(gate: Gate) -> None:
    """An exception of sleep_fn passes through submit; nothing has started, no slot is lost."""
    js = Jobserver("fork", 1)

    with pytest.raises(LookupError, match="no idea"):
        js.submit(nothing, sleep_fn=lambda: fail(LookupError, "no idea"))
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S13")
def test_sleep_fn_gates_work_without_a_slot() -> None:
    """consume=0 work is gated by sleep_fn as well."""
    js = Jobserver("fork", 1)
    answers = iter([0.05, None])

    before = time.monotonic()
    assert js.submit(add, args=(1,), consume=0, sleep_fn=lambda: next(answers)).result(PATIENCE)
    assert time.monotonic() - before >= 0.05


@pytest.mark.contract("S10", "S15")
def test_jobs_are_reaped_while_sleep_fn_sleeps(gate: Gate) -> None:
    """Sleeping is waiting: what ends meanwhile is reaped and its callbacks are issued."""
    js = Jobserver("fork", 1)
    seen: list[str] = []
    js.submit(nothing).when_done(seen.append, "called")

    def sleep_fn() -> Any:
        return None if seen else 0.02

    assert js.submit(identity, args=(1,), sleep_fn=sleep_fn, timeout=PATIENCE).result(PATIENCE) == 1


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


@pytest.mark.contract("S2")
def test_stdin_is_not_shared(method: str) -> None:
    """A worker reads an empty stdin instead of stealing the caller's."""
    with Jobserver(method, 1) as js:
        assert js.submit(read_stdin).result(PATIENCE) == ""


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
def test_every_submission_has_its_own_process(method: str) -> None:
    """Two jobs at once have two processes, none of them the caller's."""
    with Jobserver(method, 2) as js:
        first, second = js.submit(pid), js.submit(pid)
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
