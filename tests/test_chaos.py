# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""SIGKILL at random among submitters, workers, holders and foreign trees loses no slot."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest
from foreign import makes
from helpers import descendants, has_ended, process_state, wait_until
from kills import adopting

from jobserver import Jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = 4
CLIENTS = 3
CROWD = 25
MAKEFILE = """\
JOBS = a b c d e f
.PHONY: all $(JOBS)
.SILENT:
all: $(JOBS)
$(JOBS): ; sleep 0.004
"""


def nested(js: Jobserver, depth: int) -> None:
    """A job: submit two more, and wait for them."""
    time.sleep(0.001)
    if depth:
        for child in [js(nested, js, depth - 1) for _ in range(2)]:
            with contextlib.suppress(Exception):
                child.result()


def client(js: Jobserver, seed: int, directory: str) -> None:
    """Use slots in every way, until killed."""
    chance = random.Random(seed)
    make = [tool.path for tool in makes()]
    while True:
        with contextlib.suppress(Exception):
            what = chance.randrange(4)
            if what == 0 or (what == 1 and not make):
                js(nested, js, 2).result()
            elif what == 1:
                js.run([chance.choice(make)], cwd=directory)
            elif what == 2:
                with js.slot():
                    js(nested, js, 0).result()
            else:
                js.run(["sleep", "0.002"])


def start_client(js: Jobserver, seed: int, directory: str) -> int:
    """Fork a client."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            client(js, seed, directory)
        finally:
            os._exit(1)
    return pid


def living(before: set[int]) -> list[int]:
    """The processes below this one that run, but for those that were there before."""
    family = descendants().items()
    return sorted(pid for pid, state in family if state not in "ZX" and pid not in before)


def reap_orphans(before: set[int]) -> None:
    """Reap what has ended."""
    for pid, state in descendants().items():
        if state in "ZX" and pid not in before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def name_of(pid: int) -> str:
    """What a process runs."""
    try:
        with open(f"/proc/{pid}/comm") as stream:
            return stream.read().strip()
    except OSError:
        return "gone"


def kill(pid: int) -> None:
    """SIGKILL, unless it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_all(before: set[int]) -> None:
    """Kill every process below this one, and those that they are about to fork."""
    while True:
        for pid in living(before):
            kill(pid)
        reap_orphans(before)
        if not set(descendants()) - before:
            return


@contextlib.contextmanager
def stopped(before: set[int]) -> Iterator[None]:
    """Stop everybody."""
    pids: set[int] = set()
    try:
        while True:
            found = set(living(before)) - pids
            if not found:
                break
            pids |= found
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            for pid in found:
                # D: it waits for a child that it shares its memory with until that has its own,
                # and which is stopped. Others in that state stop before their next instruction.
                wait_until(lambda pid=pid: process_state(pid) in (*"TZXD", None))  # type: ignore[misc]
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def census(js: Jobserver) -> tuple[int, int]:
    """How many tokens there are, free or in berths, and the most in one berth."""
    from jobserver._slots._splice import waiting_bytes

    sections = js._shared.slots.sections
    parked = [waiting_bytes(berth) for section in sections for berth in section.berths]
    return js._shared.slots.free() + sum(parked), max(parked)


@contextlib.contextmanager
def pool(kind: str, directory: Path) -> Iterator[Jobserver]:
    """A Jobserver with SLOTS slots: its own, or those of an outer pool whose tokens all differ."""
    if kind == "own":
        with Jobserver("fork", SLOTS) as js:
            yield js
        return
    path = directory / "outer"
    os.mkfifo(path)
    outer = os.open(path, os.O_RDWR)
    os.write(outer, bytes(range(SLOTS - 1)))
    os.environ["MAKEFLAGS"] = f" -j{SLOTS} --jobserver-auth=fifo:{path}"
    try:
        js = Jobserver.from_env("fork")
    finally:
        del os.environ["MAKEFLAGS"]
    try:
        with js:
            yield js
    finally:
        os.close(outer)


def tokens(js: Jobserver) -> list[bytes]:
    """The tokens that are free, by their values; they stay where they are."""
    found = []
    for section in js._shared.slots.sections:
        found.append(os.read(section.pipe, 100))
        os.write(section.pipe, found[-1])
    return [bytes(sorted(part)) for part in found]


def chaos(directory: Path, kind: str, kills: int, seed: int) -> None:
    """Kill so many processes; look at all tokens now and then, and at the end."""
    (directory / "Makefile").write_text(MAKEFILE)
    chance = random.Random(seed)
    before = set(descendants())
    killed: dict[str, int] = {}
    with adopting(), pool(kind, directory) as js:
        clients: set[int] = set()
        all_tokens = tokens(js)
        try:
            count = 0
            while count < kills:
                clients = {pid for pid in clients if not has_ended(pid)}
                while len(clients) < CLIENTS:
                    clients.add(start_client(js, chance.randrange(1 << 30), str(directory)))
                time.sleep(chance.random() * 0.01)
                family = living(before)
                if len(family) > CROWD:
                    # Orphans of dead clients run on; not for ever, as there is one machine only.
                    for pid in set(family) - clients:
                        kill(pid)
                # A client that has not started anything yet has little to lose.
                others = [pid for pid in family if pid not in clients]
                choice = family if chance.random() < 0.3 else others
                if not choice:
                    continue
                victim = chance.choice(choice)
                who = "client" if victim in clients else name_of(victim)
                killed[who] = killed.get(who, 0) + 1
                kill(victim)
                reap_orphans(before)
                if count % 20 == 0:
                    with stopped(before):
                        assert census(js) in ((SLOTS, 0), (SLOTS, 1)), f"seed {seed}"
                count += 1
        finally:
            kill_all(before)
        js._shared.slots.sweep()
        assert tokens(js) == all_tokens, f"seed {seed}"
    sys.stdout.write(f"{kind}: {kills} kills {killed}, {-(-kills // 20)} censuses, all right\n")


@pytest.mark.contract("K7", "N5", "S18")
@pytest.mark.parametrize("kind", ["own", "joined"])
def test_some_kills(tmp_path: Path, kind: str) -> None:
    """No kill, of whomever and whenever, loses a slot, makes one up, or changes a token."""
    chaos(tmp_path, kind, kills=25, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "joined"])
def test_very_many_kills(tmp_path: Path, kind: str, pytestconfig: pytest.Config) -> None:
    """The same for longer, and in another order each time."""
    chaos(tmp_path, kind, kills=pytestconfig.getoption("--kills"), seed=time.time_ns())
