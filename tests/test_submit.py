# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver.submit: running, waiting for a slot, reaping meanwhile."""

from __future__ import annotations

import inspect
import os
import threading
import time
from typing import TYPE_CHECKING, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    append,
    await_answer,
    await_failing_callbacks,
    everything,
    free_slots,
    identity,
    lines,
    nothing,
    pid,
    touch,
)
from marks import by_method

from jobserver import Blocked, CallbackRaised, Future, Jobserver

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.contract("S1")
def test_signature() -> None:
    """submit takes fn by position or keyword and all else by keyword, with these defaults."""
    parameters = dict(inspect.signature(Jobserver.submit).parameters)
    parameters.pop("self")

    assert parameters.pop("fn").kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    defaults = {name: p.default for name, p in parameters.items()}
    assert dict(defaults.pop("kwargs")) == {}
    assert defaults == {
        "args": (),
        "consume": 1,
        "env": None,
        "preexec_fn": None,
        "sleep_fn": None,
        "timeout": None,
    }


@pytest.mark.contract("S1", "S2")
def test_runs_in_a_worker_process(method: str) -> None:
    """fn runs in another process, with the arguments given; submit returns a Future at once."""
    with Jobserver(method, 2) as js:
        future = js.submit(fn=everything, args=(1, "b"), kwargs={"c": None})
        other = js.submit(pid)

        assert isinstance(future, Future)
        assert future.result(PATIENCE) == ((1, "b"), {"c": None})
        assert other.result(PATIENCE) not in (os.getpid(), os.getppid())


@pytest.mark.fresh("about the default")
@pytest.mark.contract("S2")
def test_every_job_has_a_process_of_its_own(method: str) -> None:
    """By default no two jobs share a process."""
    with Jobserver(method, 1) as js:
        pids = [js.submit(pid).result(PATIENCE) for _ in range(3)]

    assert len(set(pids)) == 3


@pytest.mark.contract("S3")
def test_blocks_until_a_slot_is_free(gate: Gate) -> None:
    """Without a timeout submit waits for the end of a running job, then starts the new one."""
    js = Jobserver("fork", 1)
    first = js.submit(gate.enter)
    gate.await_entered(1)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(js.submit(pid).result(PATIENCE)))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert answers == []

    gate.open()
    thread.join(PATIENCE)

    assert len(answers) == 1
    assert first.result(PATIENCE) in gate.entered()


@pytest.mark.contract("S3", "S15")
def test_submit_waits_by_itself(method: str) -> None:
    """The thread that waits for a slot needs nobody else's help to see a job end."""
    with Jobserver(method, 1) as js:
        futures = [js.submit(identity, args=(n,)) for n in range(4)]

        assert [future.result(PATIENCE) for future in futures] == [0, 1, 2, 3]


@pytest.mark.contract("S4")
@by_method("timeout", [0.15, 0, 0.0])
def test_blocked(method: str, gate: Gate, tmp_path: Path, timeout: float) -> None:
    """Past the timeout submit raises Blocked, not earlier, and nothing has started."""
    with Jobserver(method, 1) as js:
        running = js.submit(gate.enter)
        before = time.monotonic()
        with pytest.raises(Blocked):
            js.submit(touch, args=(str(tmp_path / "ran"),), timeout=timeout)
        elapsed = time.monotonic() - before
        gate.open()
        running.result(PATIENCE)
        js.submit(nothing).result(PATIENCE)

    assert timeout <= elapsed < timeout + 5
    assert not (tmp_path / "ran").exists()


@pytest.mark.contract("S4")
def test_timeout_zero_starts_when_a_slot_is_free(method: str) -> None:
    """timeout=0 needs a free slot, not time."""
    with Jobserver(method, 1) as js:
        for number in range(3):
            assert js.submit(identity, args=(number,), timeout=0).result(PATIENCE) == number


@pytest.mark.contract("S4")
def test_slot_comes_in_time(gate: Gate) -> None:
    """A slot that becomes free before the timeout is used."""
    js = Jobserver("fork", 1)
    js.submit(gate.enter)
    gate.await_entered(1)
    threading.Timer(0.1, gate.open).start()

    assert js.submit(identity, args=(5,), timeout=PATIENCE).result(PATIENCE) == 5


@pytest.mark.contract("S4", "S17")
def test_enormous_timeout(gate: Gate) -> None:
    """A finite timeout may exceed what the system calls below can take."""
    js = Jobserver("fork", 1)
    js.submit(gate.enter)
    gate.await_entered(1)
    threading.Timer(0.05, gate.open).start()

    assert js.submit(identity, args=(5,), timeout=1e300).result(1e300) == 5


@pytest.mark.contract("S5")
def test_consume_zero_starts_at_once(method: str, gate: Gate) -> None:
    """consume=0 runs although all slots are taken, and takes none."""
    with Jobserver(method, 1) as js:
        taken = js.submit(gate.enter, timeout=0)
        assert js.submit(identity, args=(6,), consume=0, timeout=0).result(PATIENCE) == 6
        with pytest.raises(Blocked):
            js.submit(nothing, timeout=0)
        gate.open()
        taken.result(PATIENCE)
        free = [js.submit(nothing, consume=0, timeout=0) for _ in range(3)]
        assert js.submit(identity, args=(7,), timeout=0).result(PATIENCE) == 7
        assert [future.result(PATIENCE) for future in free] == [None] * 3


@pytest.mark.contract("S5", "S18")
def test_consume_zero_gives_no_slot_back(gate: Gate) -> None:
    """The end of a job without a slot leaves the number of slots as it was."""
    js = Jobserver("fork", 2)
    for _ in range(3):
        js.submit(nothing, consume=0).result(PATIENCE)

    assert free_slots(js, gate) == 2


@pytest.mark.contract("S15", "F13", "F17")
def test_reaps_before_waiting(method: str) -> None:
    """A job that has ended unobserved gives its slot and callbacks to the next submit."""
    seen: list[str] = []
    with Jobserver(method, 1) as js:
        first = js.submit(identity, args=(1,))
        first.when_done(seen.append, "called")
        second = js.submit(identity, args=(2,), timeout=PATIENCE)
        assert seen == ["called"]
        assert first.result(0) == 1
        assert second.result(PATIENCE) == 2


@pytest.mark.contract("S15")
def test_reaps_at_timeout_zero(tmp_path: Path) -> None:
    """Even timeout=0 first reaps: a job that has ended does not block."""
    js = Jobserver("fork", 1)
    seen: list[str] = []
    first = js.submit(append, args=(str(tmp_path / "log"), "ran"))
    first.when_done(seen.append, "called")
    await_answer(first)

    assert js.submit(identity, args=(2,), timeout=0).result(PATIENCE) == 2
    assert seen == ["called"]
    assert lines(tmp_path / "log") == ["ran"]


@pytest.mark.contract("S15", "F13")
def test_callbacks_run_on_the_waiting_thread(gate: Gate) -> None:
    """The thread blocked in submit is the one that observes the end and issues the callbacks."""
    js = Jobserver("fork", 1)
    first = js.submit(gate.enter)
    seen: list[int] = []
    first.when_done(lambda: seen.append(threading.get_ident()))
    gate.await_entered(1)
    threading.Timer(0.05, gate.open).start()

    second = js.submit(nothing, timeout=PATIENCE)

    assert seen == [threading.get_ident()]
    second.result(PATIENCE)


@pytest.mark.contract("S16", "F19", "F20")
def test_submit_raises_callback_raised(method: str, tmp_path: Path) -> None:
    """A failed callback interrupts submit: nothing has started, and the call may be repeated."""
    with Jobserver(method, 1) as js:
        first = js.submit(nothing)
        first.when_done(int, "no number")
        with pytest.raises(CallbackRaised) as caught:
            js.submit(touch, args=(str(tmp_path / "early"),), timeout=PATIENCE)
        assert isinstance(caught.value.__cause__, ValueError)
        js.submit(touch, args=(str(tmp_path / "later"),), timeout=PATIENCE).result(PATIENCE)
        js.submit(nothing).result(PATIENCE)

    assert (tmp_path / "later").exists()
    assert not (tmp_path / "early").exists()


@pytest.mark.contract("S15", "S16", "S5")
def test_reaps_without_a_slot_to_wait_for(tmp_path: Path) -> None:
    """Work that needs no slot is preceded by callbacks, too, and not begun if one of them fails."""
    js = Jobserver("fork", 1)
    first = js.submit(nothing)
    first.when_done(int, "no number")
    await_answer(first)

    with pytest.raises(CallbackRaised):
        js.submit(touch, args=(str(tmp_path / "early"),), consume=0)
    js.submit(touch, args=(str(tmp_path / "later"),), consume=0).result(PATIENCE)
    assert os.listdir(tmp_path) == ["later"]


@pytest.mark.contract("S16", "S18")
def test_callback_raised_costs_no_slot(make_gate: Callable[[], Gate]) -> None:
    """After CallbackRaised from submit all slots are there."""
    js = Jobserver("fork", 2)
    for gate in (make_gate(), make_gate()):
        for _ in range(await_failing_callbacks(js, gate)):
            with pytest.raises(CallbackRaised):
                js.submit(nothing, timeout=PATIENCE)

    assert free_slots(js, make_gate()) == 2
