# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""SIGKILL at random among submitters, workers, holders and foreign trees loses no slot."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest
from foreign import makes
from helpers import process_state, session_members, wait_until

from jobserver import Jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = 4
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
    """Fork a client in a session of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            client(js, seed, directory)
        finally:
            os._exit(1)
    wait_until(lambda: os.getsid(pid) == pid)
    return pid


def kill_session(sid: int) -> None:
    """Kill all of a session; those it is about to fork, too."""
    while True:
        members = session_members(sid)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def stopped(sids: list[int]) -> Iterator[None]:
    """Stop everybody."""
    pids: set[int] = set()
    while True:
        found = {pid for sid in sids for pid in session_members(sid)} - pids
        if not found:
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        for pid in found:
            # D: it waits for a child that it shares its memory with until that has its own, and
            # which is stopped. What else is in that state stops before its next instruction.
            wait_until(lambda pid=pid: process_state(pid) in (*"TZXD", None))  # type: ignore[misc]
        pids |= found
    try:
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


def chaos(directory: Path, kills: int, seed: int) -> None:
    """Kill so many processes; look at all tokens now and then, and at the end."""
    (directory / "Makefile").write_text(MAKEFILE)
    chance = random.Random(seed)
    with Jobserver("fork", SLOTS) as js:
        sids = [start_client(js, chance.randrange(1 << 30), str(directory)) for _ in range(3)]
        leaders = set(sids)  # those of their first processes that live
        try:
            for count in range(kills):
                time.sleep(chance.random() * 0.01)
                number = chance.randrange(len(sids))
                members = session_members(sids[number])
                victim = chance.choice(members) if members else sids[number]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                if victim == sids[number] and victim in leaders:
                    leaders.discard(victim)
                    os.waitpid(victim, 0)
                    if chance.random() < 0.5:
                        kill_session(victim)  # else its orphans run on
                    leaders.add(start_client(js, chance.randrange(1 << 30), str(directory)))
                    sids = [*dict.fromkeys([*sids, *leaders])]
                    for sid in sids[:-12]:
                        if sid not in leaders:
                            kill_session(sid)
                    sids = [sid for sid in sids if session_members(sid)]
                if count % 20 == 0:
                    with stopped(sids):
                        assert census(js) in ((SLOTS, 0), (SLOTS, 1)), f"seed {seed}"
        finally:
            for sid in {*sids, *leaders}:
                kill_session(sid)
            for leader in leaders:
                os.waitpid(leader, 0)
        js._shared.slots.sweep()
        assert js._shared.slots.free() == SLOTS, f"seed {seed}"
        tokens = os.read(js._shared.slots.sections[0].pipe, 100)
        os.write(js._shared.slots.sections[0].pipe, tokens)
        assert tokens == b"+" * SLOTS


@pytest.mark.contract("K7", "N5", "S18")
def test_some_kills(tmp_path: Path) -> None:
    """No kill, of whomever and whenever, loses a slot or makes one up."""
    chaos(tmp_path, kills=40, seed=11)


@pytest.mark.slow
def test_very_many_kills(tmp_path: Path) -> None:
    """The same for longer, and in another order each time."""
    chaos(tmp_path, kills=5000, seed=time.time_ns())
