# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Handles on a pool: replace, reclaim_resources, copies, handles as arguments of jobs, repr."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_answer,
    await_failing_callbacks,
    free_slots,
    getenv,
    identity,
    lines,
    nothing,
    pid,
)
from jobs import Appender, name_of_worker, nest, nested_at_gate, tracked_in_job, use_handles_in_job
from marks import by_method

from jobserver import Blocked, CallbackRaised, Jobserver

if TYPE_CHECKING:
    from pathlib import Path

# replace


@pytest.mark.contract("H1")
def test_replace_has_other_defaults(tmp_path: Path) -> None:
    """replace changes what it is given and keeps the other defaults; the original stays."""
    log = tmp_path / "log"
    js = Jobserver("fork", 1, env={"JOBSERVER_T": "one"}, preexec_fn=Appender(log, "pre"))

    other = js.replace(env={"JOBSERVER_T": "two"})
    plain = other.replace(preexec_fn=nothing)

    assert isinstance(other, Jobserver)
    assert other is not js
    for handle, value in ((js, "one"), (other, "two"), (plain, "two")):
        assert handle.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == [value]
    assert len(lines(log)) == 2


@pytest.mark.contract("H1")
def test_replace_sleep_fn() -> None:
    """replace may set another sleep_fn."""
    asked: list[str] = []
    js = Jobserver("fork", 1, sleep_fn=lambda: asked.append("old"))

    js.replace(sleep_fn=lambda: asked.append("new")).submit(nothing).wait(PATIENCE)
    js.submit(nothing).wait(PATIENCE)

    assert asked == ["new", "old"]


@pytest.mark.contract("H1", "J9")
def test_replace_with_none(tmp_path: Path) -> None:
    """None takes a default away: in the sibling only, and whatever is not named stays."""
    log = tmp_path / "log"
    asked: list[str] = []
    js = Jobserver(
        "fork",
        1,
        env={"JOBSERVER_T": "x"},
        preexec_fn=Appender(log),
        sleep_fn=lambda: asked.append("asked"),
    )
    bare = js.replace(env=None, preexec_fn=None, sleep_fn=None)

    assert bare.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == [None]
    assert (lines(log), asked) == ([], [])
    for handle in (js, js.replace(), bare.replace(env={"JOBSERVER_T": "x"})):
        assert handle.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == ["x"]
    assert (len(lines(log)), len(asked)) == (2, 2)


@pytest.mark.contract("H1", "J10")
def test_replace_lend(gate: Gate) -> None:
    """replace may switch lending on for a sibling only."""
    with Jobserver("fork", 2) as js:
        outer = js.submit(nested_at_gate, args=(js.replace(lend=True), gate))
        gate.await_entered(1)
        third = js.submit(gate.enter, timeout=PATIENCE)
        gate.await_entered(2)
        gate.open()

        assert outer.result(PATIENCE) != third.result(PATIENCE)


@pytest.mark.contract("H1", "J3")
def test_replace_shares_the_slots(method: str, gate: Gate) -> None:
    """All siblings together run as many jobs as there are slots, and share the context."""
    with Jobserver(method, 2) as js:
        sibling = js.replace(env={"JOBSERVER_T": "x"})
        assert sibling.context is js.context
        futures = [js.submit(gate.enter), sibling.submit(gate.enter)]
        for handle in (js, sibling):
            with pytest.raises(Blocked):
                handle.submit(nothing, timeout=0)
        gate.open()
        assert len({future.result(PATIENCE) for future in futures}) == 2


@pytest.mark.contract("H1", "S15")
def test_siblings_reap_for_each_other() -> None:
    """A submit through one handle observes the jobs of its siblings."""
    js = Jobserver("fork", 1)
    sibling = js.replace(env=())
    seen: list[str] = []
    js.submit(nothing).when_done(seen.append, "called")

    assert sibling.submit(identity, args=(1,), timeout=PATIENCE).result(PATIENCE) == 1
    assert seen == ["called"]


@pytest.mark.contract("H1", "J7")
@pytest.mark.parametrize("wrong", [{"env": {"": "x"}}, {"preexec_fn": 5}, {"sleep_fn": 5}])
def test_bad_defaults(wrong: dict[str, Any]) -> None:
    """Bad defaults are refused where they are given: in the constructor and in replace."""
    js = Jobserver("fork", 1)

    with pytest.raises((TypeError, ValueError)):
        js.replace(**wrong)
    with pytest.raises((TypeError, ValueError)):
        Jobserver("fork", 1, **wrong)


@pytest.mark.contract("H1")
def test_replace_takes_nothing_else() -> None:
    """The slots and the context cannot be replaced."""
    js = Jobserver("fork", 1)

    with pytest.raises(TypeError):
        js.replace(slots=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        js.replace({})  # type: ignore[call-arg]


# reclaim_resources


@pytest.mark.contract("H2", "F13")
def test_reclaim_does_not_wait(method: str, gate: Gate) -> None:
    """reclaim_resources reaps what has finished and leaves what runs."""
    seen: list[str] = []
    with Jobserver(method, 2) as js:
        running, ended = js.submit(gate.enter), js.submit(nothing)
        running.when_done(seen.append, "running")
        ended.when_done(seen.append, "ended")
        gate.await_entered(1)
        await_answer(ended)
        js.reclaim_resources()
        assert seen == ["ended"]
        assert js.submit(identity, args=(1,), timeout=0).result(PATIENCE) == 1
        gate.open()
        assert running.wait(PATIENCE)
    assert seen == ["ended", "running"]


@pytest.mark.contract("H2", "F19", "F20")
def test_reclaim_raises_one_error_each_time(gate: Gate) -> None:
    """reclaim_resources raises CallbackRaised until all callbacks are drained."""
    js = Jobserver("fork", 2)
    for _ in range(await_failing_callbacks(js, gate)):
        with pytest.raises(CallbackRaised):
            js.reclaim_resources()

    js.reclaim_resources()


# copies


@pytest.mark.contract("H5")
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_copies_share_the_slots(
    method: str, gate: Gate, copier: Callable[[Jobserver], Jobserver]
) -> None:
    """A copy is another handle on the same slots, with the same defaults and context."""
    with Jobserver(method, 1, env={"JOBSERVER_T": "x"}) as js:
        other = copier(js)
        assert other is not js
        assert other.context.get_start_method() == method
        running = js.submit(gate.enter)
        with pytest.raises(Blocked):
            other.submit(nothing, timeout=0)
        gate.open()
        running.wait(PATIENCE)
        assert other.submit(getenv, args=("JOBSERVER_T",)).result(PATIENCE) == ["x"]


@pytest.mark.contract("H5")
def test_deepcopy_of_a_structure() -> None:
    """A Jobserver inside a structure is copied like any value."""
    js = Jobserver("fork", 1)

    copied = copy.deepcopy({"js": [js, js]})

    assert copied["js"][0] is copied["js"][1]
    assert copied["js"][0].submit(identity, args=(1,)).result(PATIENCE) == 1


# as arguments of jobs


@pytest.mark.contract("H6", "H7")
@by_method("depth", [3, 1])
def test_travels_to_any_depth(method: str, depth: int) -> None:
    """A Jobserver can be handed down through levels of jobs, all on its slots."""
    with Jobserver(method, depth + 1) as js:
        pids = js.submit(nest, args=(js, depth)).result(PATIENCE)

    assert len(set(pids)) == depth + 1
    assert os.getpid() not in pids


@pytest.mark.contract("H6", "H7", "N2")
def test_nested_jobs_share_the_slots(method: str, gate: Gate) -> None:
    """A nested job holds a slot of the same pool: two levels fill two slots."""
    with Jobserver(method, 2) as js:
        outer = js.submit(nested_at_gate, args=(js, gate))
        gate.await_entered(1)
        with pytest.raises(Blocked):
            js.submit(nothing, timeout=0)
        gate.open()
        assert outer.result(PATIENCE) in gate.entered()
        assert js.submit(nothing, timeout=0).wait(PATIENCE)


@pytest.mark.contract("H6", "H5", "H1")
def test_every_kind_of_handle_travels(method: str) -> None:
    """Siblings and copies travel too, inside structures, keeping their defaults."""
    with Jobserver(method, 2, env={"JOBSERVER_T": "x"}) as js:
        handles = {"copy": [copy.copy(js)], "sibling": js.replace(env={"JOBSERVER_T": "y"})}
        values = js.submit(use_handles_in_job, kwargs={"handles": handles}).result(PATIENCE)

    assert values == [["x"], ["y"]]


@pytest.mark.contract("H6", "H7")
@pytest.mark.parametrize(("method", "other"), [("fork", "forkserver"), ("forkserver", "fork")])
def test_travels_to_jobs_of_another_pool(method: str, other: str, gate: Gate) -> None:
    """A handle on another pool, of another start method, takes that pool's slots in a job."""
    with Jobserver(method, 1) as js, Jobserver(other, 2) as foreign:
        outer = js.submit(nested_at_gate, args=(foreign, gate))
        gate.await_entered(1)
        second = foreign.submit(gate.enter, timeout=0)
        with pytest.raises(Blocked):
            foreign.submit(nothing, timeout=0)
        gate.open()
        assert len({outer.result(PATIENCE), second.result(PATIENCE)}) == 2


@pytest.mark.contract("H7", "H8")
def test_futures_do_not_travel(method: str, gate: Gate) -> None:
    """In the job the handle has nothing in flight, whatever the caller has."""
    with Jobserver(method, 3) as js:
        running = [js.submit(gate.enter) for _ in range(2)]
        gate.await_entered(2)
        inside = js.submit(tracked_in_job, args=(js,)).result(PATIENCE)
        gate.open()
        assert all(future.wait(PATIENCE) for future in running)

    assert inside == f"Jobserver('{method}', tracked=0)"


# repr and names


@pytest.mark.contract("H8")
def test_repr_of_a_jobserver(method: str, gate: Gate) -> None:
    """repr shows the start method and the number of Futures in flight."""
    with Jobserver(method, 2) as js:
        assert repr(js) == f"Jobserver('{method}', tracked=0)"
        futures = [js.submit(gate.enter), js.submit(gate.enter)]
        assert repr(js) == f"Jobserver('{method}', tracked=2)"
        gate.open()
        assert all(future.wait(PATIENCE) for future in futures)
        assert repr(js) == f"Jobserver('{method}', tracked=0)"


@pytest.mark.contract("H9")
def test_repr_of_a_future(method: str, gate: Gate) -> None:
    """repr shows the state, the callbacks still due and, while it runs, the process."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        (worker,) = gate.await_entered(1)
        assert repr(future) == f"Future(running, callbacks=0, pid={worker})"
        future.when_done(nothing)
        assert repr(future) == f"Future(running, callbacks=1, pid={worker})"
        gate.open()
        assert future.wait(PATIENCE)
        assert repr(future) == "Future(done, callbacks=0, pid=None)"


@pytest.mark.contract("H10")
def test_name_of_workers(method: str) -> None:
    """Inside a job the current process is named Jobserver-worker."""
    with Jobserver(method, 1) as js:
        assert js.submit(name_of_worker).result(PATIENCE) == "Jobserver-worker"
    assert multiprocessing.current_process().name == "MainProcess"


@pytest.mark.contract("H1", "H12")
def test_sibling_keeps_the_pool(gate: Gate) -> None:
    """When one of two handles goes, the pool lives on in the other."""
    js = Jobserver("fork", 2)
    sibling = js.replace(env=())
    js.submit(pid).wait(PATIENCE)
    del js
    gc.collect()

    assert free_slots(sibling, gate) == 2
