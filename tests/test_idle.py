# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Who waits for something sleeps until it happens: nobody is woken by the clock."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from foreign import each_make
from helpers import (
    PATIENCE,
    Gate,
    command_line,
    descendants,
    has_ended,
    janitors_of,
    started_program,
    wait_until,
)

from jobserver import Jobserver
from jobserver._slots import _inotify
from jobserver._slots._lookout import Lookout
from jobserver._slots._pool import SlotPool
from jobserver._slots._shadow import Shadow

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from foreign import Tool

#: Seconds in which a process that looks five times a second could not stay within MOST.
WINDOW = 1.0
MOST = 2

# Programs that come to rest after a word; each reads its input at last, which does not end.

HOLDS_A_SLOT = """\
from jobserver import Jobserver
with Jobserver("fork", 2) as js, js.slot():
    print("ready")
    input()
"""
# Also the job, and the zygote that has started it.
WAITS_FOR_A_RESULT = """\
import signal, sys
from jobserver import Jobserver
with Jobserver("forkserver", 2) as js:
    future = js.submit(signal.pause)
    print("ready")
    future.result()
"""
HAS_WORKERS_AT_REST = """\
from jobserver import Jobserver, JobserverExecutor
with Jobserver("fork", 2, max_tasks_per_child=None) as js, JobserverExecutor(1, "fork") as executor:
    futures = [js(int) for _ in range(2)]
    print([future.result() for future in futures], executor.submit(int).result())
    input()
"""
HAS_A_JANITOR = """\
from jobserver import Jobserver
with Jobserver.from_env("fork") as js:
    leases = [js._shared.slots.try_take() for _ in range(2)]
    print("ready")
    input()
"""
RUNS_WHAT_TAKES_NO_PART = """\
import sys
from jobserver import Jobserver
with Jobserver("fork", int(sys.argv[1])) as js:
    js.run(["sh", "-c", "echo ready; read line"])
"""


def wakings(pids: set[int]) -> dict[tuple[int, str], int]:
    """How often each thread of some processes has been woken so far."""
    found = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/status") as stream:
                    text = stream.read()
                found[pid, thread] = int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found


def restless(pids: set[int]) -> dict[int, int]:
    """How often those processes are woken within a WINDOW that are so more than MOST times."""
    before = wakings(pids)
    time.sleep(WINDOW)
    after = wakings(pids)
    counts = dict.fromkeys(pids, 0)
    for place, count in after.items():
        counts[place[0]] += count - before.get(place, 0)
    return {pid: count for pid, count in counts.items() if count > MOST}


@pytest.mark.contract("K5", "K6", "K9", "F6", "W5", "H14")
def test_nobody_is_woken_by_the_clock(tmp_path: Path) -> None:
    """A server, a holder, a waiter, workers at rest, a janitor, a run: all sleep."""
    fifo = str(tmp_path / "pool")
    joined = {"MAKEFLAGS": f" -j3 --jobserver-auth=fifo:{fifo}"}
    programs: list[tuple[list[str], dict[str, str]]] = [
        (["-m", "jobserver", "serve", "-j3", "--path", fifo], {}),
        (["-c", HAS_A_JANITOR], joined),
        (["-c", HOLDS_A_SLOT], {}),
        (["-c", WAITS_FOR_A_RESULT], {}),
        (["-c", HAS_WORKERS_AT_REST], {}),
        (["-c", RUNS_WHAT_TAKES_NO_PART, "1"], {}),
        (["-c", RUNS_WHAT_TAKES_NO_PART, "3"], {}),
    ]
    with contextlib.ExitStack() as stack:
        pids: set[int] = set()
        for arguments, env in programs:
            program = stack.enter_context(started_program(arguments, stdin=True, env=env))
            assert first_line(program), arguments
            pids |= {program.pid, *descendants(program.pid)}
        wait_until(lambda: len(janitors_of(fifo)) == 1, "the janitor")
        pids.update(janitors_of(fifo))
        assert len(pids) > 14

        # A busy machine may take its time until all have come to rest.
        deadline = time.monotonic() + PATIENCE
        awake = restless(pids)
        while awake and time.monotonic() < deadline:
            awake = restless(set(awake))
        assert {command_line(pid): count for pid, count in awake.items()} == {}
        assert not any(map(has_ended, pids))


def first_line(program: subprocess.Popen[str]) -> str:
    """What a program says first."""
    assert program.stdout is not None
    return program.stdout.readline()


@pytest.mark.contract("K6")
@each_make()
def test_run_sleeps_while_a_builder_has_what_it_wants(make: Tool, tmp_path: Path) -> None:
    """A make that has used the slots, and now runs one long command, wakes nobody."""
    quick = "".join(f"quick{number}:\n\t@sleep 0.1\n" for number in range(3))
    (tmp_path / "Makefile").write_text(
        f"long: quick0 quick1 quick2\n\t@echo ready; read line\n{quick}"
    )
    code = RUNS_WHAT_TAKES_NO_PART.replace('["sh", "-c", "echo ready; read line"]', "sys.argv[2:]")
    with started_program(
        ["-c", code, "3", make.path, "-C", str(tmp_path), "--no-print-directory"], stdin=True
    ) as program:
        assert first_line(program) == "ready\n"
        wait_until(lambda: not restless({program.pid}), "it to come to rest")


# The clock, where there is no event


def count_steps(shadow: Shadow, begin: float, seconds: float) -> int:
    """How often a shadow wants to be looked at while nothing happens, on a clock of its own."""
    now = begin
    for count in range(1000):
        shadow.step(now)
        if shadow.wake_at is None or shadow.wake_at > begin + seconds:
            return count
        now = max(now, shadow.wake_at)
    raise AssertionError("the clock does not advance")


@pytest.mark.contract("K6")
@pytest.mark.parametrize(
    ("slots", "watched", "most"),
    # Of the slots one is the command's own. A last one is offered by the clock.
    [(1, True, 0), (2, True, 28), (3, True, 4), (50, True, 4), (3, False, 160)],
)
def test_wakings_in_a_minute(slots: int, watched: bool, most: int) -> None:
    """A command that takes no part costs a few looks at first, then none, or ever fewer."""
    pool = SlotPool.create(slots)
    own = pool.try_take()
    assert own is not None
    now = time.monotonic()
    with contextlib.closing(Shadow(pool, now)) as shadow:
        if watched:
            shadow.look()
        assert count_steps(shadow, now, 60.0) <= most
        assert shadow.peak <= slots - 1
    own.release()
    assert pool.free() == slots
    pool.close()


@pytest.mark.contract("K7")
@pytest.mark.parametrize("hears", ["reading", "sweeping"])
def test_slot_on_offer_is_there_for_who_is_short(
    hears: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot that lies on offer while others are free is had by who waits when none is."""
    listening = threading.Event()
    begin = Lookout.begin

    def begin_and_tell(self: Lookout, lease: object) -> bool:
        began = begin(self, lease)  # type: ignore[arg-type]
        if began:
            listening.set()
        return began

    def listen_to_sweepers(fd: int, fifo: int, *, openings: bool) -> int:
        return listen(fd, fifo, openings=True)  # nobody opens the pipe

    listen = _inotify.listen
    monkeypatch.setattr(Lookout, "begin", begin_and_tell)
    if hears == "sweeping":
        monkeypatch.setattr(_inotify, "listen", listen_to_sweepers)
    with Jobserver("fork", 3) as js, started_waiter(js, gate):
        assert listening.wait(PATIENCE)
        assert js._shared.slots.free() == 1
        jobs = [js.submit(gate.enter, timeout=PATIENCE) for _ in range(2)]
        gate.await_entered(3)
        gate.open()
        for job in jobs:
            job.result(PATIENCE)


@contextlib.contextmanager
def started_waiter(js: Jobserver, gate: Gate) -> Iterator[None]:
    """A command that takes no part, and passes a gate."""
    code = "import helpers, pathlib, sys; helpers.Gate(pathlib.Path(sys.argv[1])).enter()"
    command = [sys.executable, "-c", code, gate.directory]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(js.run(command, env=env).returncode), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        gate.open()
        thread.join(PATIENCE)
    assert statuses == [0]
