# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""SIGKILL at random among submitters, workers, holders and foreign trees loses no slot."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest
from foreign import makes
from helpers import descendants, has_ended, process_state, wait_until

from jobserver import Jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = 4
CLIENTS = 3
CROWD = 25
PR_SET_CHILD_SUBREAPER = 36
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


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """
    Be the parent of all orphans below this process, until the end of the block.

    So whom to kill is chosen among this process's own descendants only, never by a number that may
    have become somebody else's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


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


def chaos(directory: Path, kills: int, seed: int) -> None:
    """Kill so many processes; look at all tokens now and then, and at the end."""
    (directory / "Makefile").write_text(MAKEFILE)
    chance = random.Random(seed)
    before = set(descendants())
    with adopting(), Jobserver("fork", SLOTS) as js:
        clients: set[int] = set()
        try:
            for count in range(kills):
                clients = {pid for pid in clients if not has_ended(pid)}
                while len(clients) < CLIENTS:
                    clients.add(start_client(js, chance.randrange(1 << 30), str(directory)))
                time.sleep(chance.random() * 0.01)
                family = living(before)
                if len(family) > CROWD:
                    # Orphans of dead clients run on; not for ever, as there is one machine only.
                    for pid in set(family) - clients:
                        kill(pid)
                kill(chance.choice(family))
                reap_orphans(before)
                if count % 20 == 0:
                    with stopped(before):
                        assert census(js) in ((SLOTS, 0), (SLOTS, 1)), f"seed {seed}"
        finally:
            kill_all(before)
        js._shared.slots.sweep()
        assert js._shared.slots.free() == SLOTS, f"seed {seed}"
        pipe = js._shared.slots.sections[0].pipe
        tokens = os.read(pipe, 100)
        os.write(pipe, tokens)
        assert tokens == b"+" * SLOTS


@pytest.mark.contract("K7", "N5", "S18")
def test_some_kills(tmp_path: Path) -> None:
    """No kill, of whomever and whenever, loses a slot or makes one up."""
    chaos(tmp_path, kills=40, seed=11)


@pytest.mark.slow
def test_very_many_kills(tmp_path: Path) -> None:
    """The same for longer, and in another order each time."""
    chaos(tmp_path, kills=5000, seed=time.time_ns())
