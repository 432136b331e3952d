# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The life of warm workers: how many there are, below whom, and what ends them."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    descendants,
    has_ended,
    identity,
    nothing,
    pid,
    session_members,
    started_program,
    wait_until,
)
from marks import by_method
from warm_jobs import pid_here_and_below, starve, tree, use_and_close

from jobserver import Jobserver

if TYPE_CHECKING:
    from helpers import Gate


def warm(method: str, slots: int = 1, **options: Any) -> Jobserver:
    """A Jobserver whose workers run any number of jobs."""
    return Jobserver(method, slots, max_tasks_per_child=None, **options)


def run(js: Jobserver, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Submit and wait."""
    return js.submit(fn, args=args, timeout=PATIENCE, **options).result(PATIENCE)


def living() -> list[int]:
    """Descendants of this process; those that have ended are their parents' to reap, in time."""
    return [pid for pid, state in descendants().items() if state != "Z"]


# Nesting


@pytest.mark.contract("N3", "W1", "W5")
@by_method("slots, lend, consume", [(2, False, 0), (1, False, 1), (1, True, 0), (3, True, 1)])
def test_trees(method: str, slots: int, lend: bool, consume: int) -> None:
    """A tree of jobs ends with any slots; what is at rest then are not more workers than slots."""
    depth = 2 if method == "spawn" else 3
    with warm(method, slots, lend=lend) as js:
        others = len(living())
        bound = others + slots + (method == "forkserver")  # the zygote may be new
        for _ in range(2):
            assert run(js, tree, js, depth, consume, None) == 2 ** (depth + 1) - 1
            assert js._shared.slots.free() == slots
            wait_until(lambda: len(living()) <= bound, "workers to end")
            assert 1 <= len(js._shared.reactor.crew) <= slots


@pytest.mark.contract("N3", "W1")
def test_starving_in_successive_jobs(method: str) -> None:
    """A job hears who starves below it also if a job before it here heard nobody."""
    with warm(method) as js:
        for hungry in (False, True, False, True):
            assert (run(js, starve, js, hungry) > 0) == hungry


@pytest.mark.contract("H6", "W1")
def test_jobserver_for_later_jobs(method: str) -> None:
    """A Jobserver is an argument of any number of jobs, also if each closes its own handle."""
    with warm(method, 2) as js:
        pairs = [run(js, fn, js) for fn in (pid_here_and_below, use_and_close) * 2]
        assert all(here != below for here, below in pairs)
        assert len({here for here, _ in pairs}) == 1
        assert js._shared.slots.free() == 2


@pytest.mark.contract("W5")
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_seats(slots: int) -> None:
    """There are as many seats for workers at rest as slots, and berths besides for all tokens."""
    js = warm("fork", slots)
    (section,) = js._shared.slots.sections
    assert section.seats == slots
    assert len(section.berths) >= 2 * slots


# The end of being idle


@pytest.mark.contract("W6")
def test_idle_workers_end_by_themselves(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker for which nobody has a job ends, and then another one is started."""
    monkeypatch.setattr("jobserver._shared.IDLE", 0.05)
    with warm(method) as js:
        worker = run(js, pid)
        wait_until(lambda: has_ended(worker), "the worker to end")
        assert js._shared.slots.free() == 1
        assert run(js, pid) != worker


@pytest.mark.contract("W6")
@by_method("pause", [0.01, 0.003])
def test_no_job_is_lost_when_idle_workers_end(
    method: str, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that comes just as its worker ends for want of jobs runs, and runs once."""
    monkeypatch.setattr("jobserver._shared.IDLE", pause)
    chance = random.Random(7)
    with warm(method) as js:
        for number in range(5 if method == "spawn" else 60):
            assert run(js, identity, number) == number
            time.sleep(pause * chance.uniform(0.8, 1.5))
        assert js._shared.slots.free() == 1


# The end of the owner


PROGRAM = """
import os, signal, sys, time
from helpers import Gate, identity, pid
from jobserver import Jobserver

if __name__ == "__main__":
    method, end, directory = sys.argv[1:]
    js = Jobserver(method, 2, max_tasks_per_child=None)
    gate = Gate(directory)
    busy = js.submit(gate.enter)
    print(js.submit(pid).result(), flush=True)
    gate.await_entered(1)
    if end == "SIGKILL":
        time.sleep(60)
    if end == "os._exit":
        os._exit(0)
    gate.open()
    busy.result()
    try:
        print("ready", flush=True)
        while end == "wait":
            time.sleep(0.001)
    except KeyboardInterrupt:
        for number in range(20):
            assert js.submit(identity, args=(number,)).result() == number
        print("done")
"""


@pytest.mark.contract("W7")
@by_method("end", ["SIGKILL", "os._exit"])
def test_workers_end_with_their_owner(
    method: str, end: str, gate: Gate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A worker at rest ends with its owner, one at work when its job is done; the zygote, too."""
    script = tmp_path_factory.mktemp("program") / "program.py"
    script.write_text(PROGRAM)
    with started_program([str(script), method, end, gate.directory]) as process:
        assert process.stdout is not None
        idle = int(process.stdout.readline())
        (busy,) = gate.await_entered(1)
        if end == "SIGKILL":
            process.kill()
        process.wait(PATIENCE)
        wait_until(lambda: has_ended(idle), "the worker at rest to end")
        assert not has_ended(busy)
        gate.open()
        wait_until(lambda: not session_members(process.pid), "everything to end")


@pytest.mark.contract("W7")
@by_method("end", ["exit", "wait"])
def test_programs_end_quietly(
    method: str, end: str, gate: Gate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Workers at rest hold up no program's end; Ctrl-C ends no job that is submitted after it."""
    script = tmp_path_factory.mktemp("program") / "program.py"
    script.write_text(PROGRAM)
    gate.open()
    with started_program([str(script), method, end, gate.directory]) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        if end == "wait":
            os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert lines[1] == "ready\n"
    assert (process.returncode, out, err) == (0, "done\n" if end == "wait" else "", "")


@pytest.mark.contract("W7", "H3")
@by_method("end", ["closed", "dropped"])
def test_workers_end_with_their_jobserver(method: str, end: str) -> None:
    """A Jobserver that is closed or dropped takes its workers along."""
    js = warm(method, 2)
    futures = [js.submit(pid) for _ in range(2)]
    workers = [future.result(PATIENCE) for future in futures]
    if end == "closed":
        with js:
            pass
    else:
        del js, futures
        gc.collect()
    wait_until(lambda: all(map(has_ended, workers)), "the workers to end")


@pytest.mark.contract("W7", "F26")
def test_worker_whose_jobserver_is_gone_does_not_rest() -> None:
    """A job whose Jobserver and Future nobody holds any more leaves no worker at rest."""
    before = descendants()
    js = warm("fork")
    future = js.submit(time.sleep, args=(0.05,))
    worker = int(repr(future).rpartition("pid=")[2].rstrip(")"))
    with pytest.warns(ResourceWarning):
        del js, future

    def ended() -> bool:
        Jobserver("fork", 1)  # which looks after those that nobody looks after
        return has_ended(worker)

    wait_until(ended, "the worker to end")
    assert worker not in before


@pytest.mark.contract("W7")
def test_forked_process_keeps_no_worker(method: str, gate: Gate) -> None:
    """A process that the program itself has forked does not keep the program's workers alive."""
    with warm(method) as js:
        worker = run(js, pid)
        child = os.fork()
        if child == 0:
            try:
                gate.enter()
                # Its own handle, on the same slots.
                os._exit(int(run(js, pid) == worker))
            finally:
                os._exit(2)
        gate.await_entered(1)
    wait_until(lambda: has_ended(worker), "the worker to end")
    gate.open()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.contract("W1", "W6")
def test_killed_at_rest(method: str) -> None:
    """A worker that is killed at rest is no job's death: the next job gets another one."""
    with warm(method) as js:
        for _ in range(3):
            worker = run(js, pid)
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda pid=worker: has_ended(pid), "the worker to die")  # type: ignore[misc]
            assert run(js, pid) != worker
        assert js._shared.slots.free() == 1
        run(js, nothing)
