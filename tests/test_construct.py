# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver(...): its arguments, their defaults and what is refused."""

from __future__ import annotations

import inspect
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    everything,
    free_slots,
    getenv,
    identity,
    lines,
    run_program,
)
from jobs import Appender, nested_at_gate
from marks import by_method

from jobserver import Blocked, Jobserver

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.contract("J1")
def test_signature() -> None:
    """The constructor takes context and slots by position, the rest by keyword."""
    parameters = inspect.signature(Jobserver).parameters

    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["context", "slots"]
    assert parameters["context"].default is None
    assert parameters["slots"].default is None
    assert parameters["env"].default == ()
    assert parameters["lend"].default is False
    for name in ("env", "preexec_fn", "sleep_fn", "lend"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is not inspect.Parameter.empty


@pytest.mark.contract("J2")
def test_default_context_is_the_platforms() -> None:
    """Context None means the platform's default start method."""
    assert Jobserver().context.get_start_method() == multiprocessing.get_start_method()


@pytest.mark.contract("J2")
def test_default_context_follows_the_programs_choice() -> None:
    """Context None means the start method that the program has set, if it has."""
    done = run_program(
        [
            "-c",
            "import multiprocessing, jobserver\n"
            "multiprocessing.set_start_method('spawn')\n"
            "print(jobserver.Jobserver().context.get_start_method())",
        ]
    )

    assert (done.stdout, done.stderr) == ("spawn\n", "")


@pytest.mark.contract("J2")
def test_no_global_start_method_is_fixed() -> None:
    """Making and using a Jobserver leaves the program free to set its own start method later."""
    done = run_program(
        [
            "-c",
            "import multiprocessing, jobserver\n"
            "js = jobserver.Jobserver('fork', 1)\n"
            "print(js.submit(len, args=([],)).result())\n"
            "multiprocessing.set_start_method('forkserver')\n"
            "print(multiprocessing.get_start_method())",
        ]
    )

    assert (done.stdout, done.stderr) == ("0\nforkserver\n", "")


@pytest.mark.contract("J2", "J3")
def test_context_by_name(method: str) -> None:
    """A start method's name is taken and read back through the context property."""
    js = Jobserver(method, 1)

    assert isinstance(js.context, multiprocessing.context.BaseContext)
    assert js.context.get_start_method() == method
    assert js.submit(identity, args=(7,)).result(PATIENCE) == 7


@pytest.mark.contract("J2", "J3")
def test_context_object(method: str) -> None:
    """A multiprocessing context is taken, used and read back as it is."""
    context = multiprocessing.get_context(method)

    js = Jobserver(context, 1)

    assert js.context is context
    assert js.submit(identity, args=(7,)).result(PATIENCE) == 7


@pytest.mark.contract("J3")
def test_context_is_read_only() -> None:
    """The context property cannot be assigned."""
    js = Jobserver("fork", 1)

    with pytest.raises(AttributeError):
        js.context = multiprocessing.get_context("spawn")  # type: ignore[misc]


@pytest.mark.contract("J2")
@pytest.mark.parametrize("context", ["thread", "", "FORK", 3, b"fork", object()])
def test_bad_context(context: Any) -> None:
    """What is neither a start method nor a context is refused."""
    with pytest.raises((TypeError, ValueError)):
        Jobserver(context)


@pytest.mark.contract("J4", "S3", "S4")
@by_method("slots", [2, 1, 5])
def test_slots_jobs_run_at_once(method: str, gate: Gate, slots: int) -> None:
    """Exactly as many jobs run at once as there are slots."""
    with Jobserver(method, slots) as js:
        futures = [js.submit(gate.enter) for _ in range(slots)]
        gate.await_entered(slots)
        with pytest.raises(Blocked):
            js.submit(gate.enter, timeout=0)
        gate.open()

        assert len({future.result(PATIENCE) for future in futures}) == slots
    assert len(gate.entered()) == slots


@pytest.mark.contract("J5")
def test_slots_default_to_usable_cpus(make_gate: Callable[[], Gate]) -> None:
    """Slots None means the number of CPUs in this process's affinity mask, not the machine's."""
    mine = os.sched_getaffinity(0)
    counts = {}
    try:
        for cpus in ({min(mine)}, mine):
            os.sched_setaffinity(0, cpus)
            counts[len(cpus)] = free_slots(Jobserver("fork"), make_gate(), most=len(mine) + 2)
    finally:
        os.sched_setaffinity(0, mine)

    assert counts == {1: 1, len(mine): len(mine)}


@pytest.mark.contract("J6")
def test_slots_default_to_the_outer_pool(
    tmp_path: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under make, slots None means make's tokens and the implicit one; all tokens go back."""
    path = tmp_path / "pool"
    os.mkfifo(path)
    pool = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(pool, b"+xyz")
        monkeypatch.setenv("MAKEFLAGS", f" -j5 --jobserver-auth=fifo:{path}")
        with Jobserver("fork") as js:
            slots = free_slots(js, gate)

        assert slots == 5
        assert sorted(os.read(pool, 10)) == sorted(b"+xyz")
    finally:
        os.close(pool)


@pytest.mark.contract("J7")
@pytest.mark.parametrize("slots", [True, False, 1.0, "2", b"2", [1], object()])
def test_slots_of_wrong_type(slots: Any) -> None:
    """Slots that are a bool or no int raise TypeError."""
    with pytest.raises(TypeError):
        Jobserver("fork", slots)


@pytest.mark.contract("J7")
@pytest.mark.parametrize("slots", [0, -1, -(10**9)])
def test_too_few_slots(slots: int) -> None:
    """Slots below 1 raise ValueError."""
    with pytest.raises(ValueError):
        Jobserver("fork", slots)


@pytest.mark.contract("J8")
def test_4096_slots(gate: Gate) -> None:
    """A pool of 4,096 slots can be made and runs many jobs at once."""
    with Jobserver("fork", 4096) as js:
        futures = [js.submit(gate.enter, timeout=0) for _ in range(40)]
        gate.await_entered(40)
        gate.open()

        assert len({future.result(PATIENCE) for future in futures}) == 40


@pytest.mark.contract("J8")
def test_4096_slots_with_the_usual_descriptor_limit() -> None:
    """4,096 slots need no more descriptors than a default shell allows (1,024)."""
    done = run_program(
        [
            "-c",
            "import resource\n"
            "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))\n"
            "import jobserver\n"
            "js = jobserver.Jobserver('fork', 4096)\n"
            "print(sum(js.map(abs, [(-i,) for i in range(20)])))",
        ]
    )

    assert (done.stdout, done.stderr) == ("190\n", "")


@pytest.mark.slow
@pytest.mark.contract("J8")
def test_4096_jobs_at_once() -> None:
    """4,096 jobs run at once on 4,096 slots, and all slots come back."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 20_000:
        pytest.skip("the hard limit on descriptors is too low here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, hard))
    # Not a gate, at which so many would poll, and give up before the last one has been started.
    reader, writer = os.pipe()

    def stay() -> None:
        os.close(writer)
        os.read(reader, 1)  # its end comes when the test closes the writer, or has ended

    try:
        with Jobserver("fork", 4096) as js:
            futures = [js.submit(os.getpid, preexec_fn=stay) for _ in range(4096)]
            with pytest.raises(Blocked):
                js.submit(os.getpid, timeout=0)
            os.close(writer)
            writer = -1
            assert len({future.result() for future in futures}) == 4096
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.contract("J8")
def test_docs_tell_of_descriptors() -> None:
    """The class says that and from how many slots on more descriptors are needed."""
    text = (Jobserver.__doc__ or "") + (Jobserver.__init__.__doc__ or "")

    assert "descriptors" in text
    assert "a quarter of RLIMIT_NOFILE (256 slots of the usual 1,024)" in " ".join(text.split())


@pytest.mark.contract("J9")
def test_defaults_hold_for_every_submission(method: str, tmp_path: Path) -> None:
    """env, preexec_fn and sleep_fn of the handle apply to submit, call and map alike."""
    asked: list[int] = []

    def sleep_fn() -> None:
        asked.append(os.getpid())

    js = Jobserver(
        method,
        1,
        env={"JOBSERVER_T": "default"},
        preexec_fn=Appender(tmp_path / "log"),
        sleep_fn=sleep_fn,
    )

    with js:
        assert js.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == ["default"]
        assert js(getenv, "JOBSERVER_T").result(PATIENCE) == ["default"]
        assert list(js.map(getenv, [("JOBSERVER_T",)])) == [["default"]]
    assert len(lines(tmp_path / "log")) == 3
    assert asked == [os.getpid()] * 3


@pytest.mark.contract("J10", "N6", "N9")
@pytest.mark.parametrize("lend", [False, True])
def test_lend(method: str, gate: Gate, lend: bool) -> None:
    """With lend=True, and only then, a job's slot is free for others while it waits."""
    with Jobserver(method, 2, lend=lend) as js:
        outer = js.submit(nested_at_gate, args=(js, gate))
        gate.await_entered(1)
        if lend:
            third = js.submit(gate.enter, timeout=PATIENCE)
            gate.await_entered(2)
            gate.open()
            assert third.result(PATIENCE) in gate.entered()
        else:
            with pytest.raises(Blocked):
                js.submit(gate.enter, timeout=0.2)
            gate.open()

        assert outer.result(PATIENCE) in gate.entered()


@pytest.mark.contract("J11")
def test_call_is_submit(method: str) -> None:
    """js(fn, *args, **kwargs) runs fn with exactly these arguments."""
    with Jobserver(method, 1) as js:
        assert js(add, 3, b=4).result(PATIENCE) == 7


@pytest.mark.contract("J12")
def test_call_passes_keywords_of_any_name(method: str) -> None:
    """Keyword arguments that are named like submit's own reach fn."""
    names = ["fn", "self", "args", "kwargs", "timeout", "consume", "env", "preexec_fn", "sleep_fn"]
    keywords: dict[str, Any] = {name: number for number, name in enumerate(names)}

    with Jobserver(method, 1) as js:
        assert js(everything, 1, **keywords).result(PATIENCE) == ((1,), keywords)
        assert js.submit(everything, kwargs=keywords).result(PATIENCE) == ((), keywords)


@pytest.mark.contract("J11")
def test_call_needs_a_function() -> None:
    """js() without fn, or with fn by keyword, is a TypeError at the call."""
    js = Jobserver("fork", 1)

    with pytest.raises(TypeError):
        js()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        js(fn=add)  # type: ignore[call-arg]
