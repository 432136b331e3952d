# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""SIGKILL at each step of taking and returning, where more than one process has a part in it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from typing import TYPE_CHECKING, NamedTuple

import pytest
from helpers import PATIENCE, descendants, has_ended, janitors_of, nothing, wait_until
from kills import adopting, die_at

from jobserver import Blocked, Jobserver, SubmissionDied
from jobserver._slots._makeflags import Outer
from jobserver._slots._pool import SlotPool
from jobserver._slots._splice import waiting_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A joined pool: its tokens are another's, and come back by the janitor

TOKENS = b"ab"


@pytest.fixture
def outer(tmp_path: Path) -> Iterator[str]:
    """The FIFO of a pool of three slots, one of which is implicit."""
    path = str(tmp_path / "pool")
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(fd, TOKENS)
    yield path
    wait_until(lambda: not janitors_of(path), "the janitors to end")
    assert sorted(os.read(fd, 10)) == sorted(TOKENS)
    os.close(fd)


def use(pool: SlotPool) -> None:
    """Take each token, the implicit one first; lend and return, or leave it to be swept."""
    implicit, lent, left = (pool.try_take() for _ in range(3))
    assert implicit is not None
    assert lent is not None
    assert left is not None
    moved = lent.relocated()
    assert moved is not None
    left.abandon()
    assert pool.sweep() == 1
    moved.release()
    implicit.release()


def kill_a_joined_program(path: str, what: str) -> int:
    """Kill a program that has joined a pool, at each step; after each kill all tokens are back."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    step = 0
    while True:
        step += 1
        pid = os.fork()
        if pid == 0:
            try:
                joined = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                os.close(fd)
                die_at(step, what, functools.partial(use, SlotPool.join(Outer(joined, 3))))
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        wait_until(lambda: waiting_bytes(fd) == len(TOKENS), f"all tokens after step {step}")
        if status == 0:
            os.close(fd)
            return step


@pytest.mark.contract("J6", "S18")
def test_joined_program_killed_at_each_line(outer: str) -> None:
    """SIGKILL before any line of taking, lending and returning loses no token of an outer pool."""
    assert kill_a_joined_program(outer, "place") > 40


@pytest.mark.slow
def test_joined_program_killed_at_each_instruction(outer: str) -> None:
    """The same before each instruction of the interpreter."""
    assert kill_a_joined_program(outer, "opcode") > 500


# A job that submits: its own job runs on


class Nested(NamedTuple):
    """A job that submits another one."""

    slots: int
    #: Whether its job runs until it is killed. With one slot the submission ends then.
    stays: bool

    def submit(self, js: Jobserver, step: int, what: str) -> None:
        """Submit, wait, and die on the way."""
        die_at(step, what, lambda: self.submit_and_wait(js))

    def submit_and_wait(self, js: Jobserver) -> None:
        """Take or lend a slot; be there when it comes back."""
        job = js(signal.pause if self.stays else nothing)
        with contextlib.suppress(Blocked):
            js.submit(nothing, timeout=0).wait()
        job.wait(signal=signal.SIGKILL)


TAKEN = pytest.param(Nested(2, stays=True), id="taken")
LENT = pytest.param(Nested(1, stays=True), id="lent")
HAD_BACK = pytest.param(Nested(1, stays=False), id="lent and had back")


def kill_a_submitter(nested: Nested, what: str) -> int:
    """Kill a submitting job at each step; its job keeps its slot, and returns it by its death."""
    step = ran_on = 0
    killed = True
    before = set(descendants())
    with adopting(), Jobserver("fork", nested.slots) as js:
        pool = js._shared.slots
        # What is lent to a job that stays does not come back: a wait without an end.
        while killed and (nested != (1, True) or ran_on < 3):
            step += 1
            job = js(nested.submit, js, step, what)
            try:
                job.result(PATIENCE)
                killed = False
            except SubmissionDied:
                pass
            # Now who it has left behind is this process's child.
            js._shared.reactor.reap_lingering(PATIENCE)
            # Of a job that has just been killed, or is about to end, both are so in the end.
            orphans = set(descendants()) - before

            def right(orphans: set[int] = orphans) -> bool:
                pool.sweep()
                return pool.free() == nested.slots - living(orphans)

            wait_until(right, f"the right number of slots after step {step}")
            ran_on += living(orphans) > 0
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            pool.sweep()
            assert pool.free() == nested.slots, f"step {step}"
    assert not nested.stays or ran_on > 0
    return step


def living(pids: set[int]) -> int:
    """How many of some processes have not ended."""
    return sum(not has_ended(pid) for pid in pids)


@pytest.mark.fresh("each job has a process of its own to be killed")
@pytest.mark.contract("S18", "N4", "F26")
@pytest.mark.parametrize("nested", [TAKEN, LENT])
def test_submitter_killed_at_each_line(nested: Nested) -> None:
    """A submitter killed before any line leaves each slot with who runs on it, or free."""
    assert kill_a_submitter(nested, "place") > 40


@pytest.mark.slow
@pytest.mark.fresh("each job has a process of its own to be killed")
@pytest.mark.parametrize("nested", [TAKEN, LENT, HAD_BACK])
def test_submitter_killed_at_each_instruction(nested: Nested) -> None:
    """The same before each instruction of the interpreter."""
    assert kill_a_submitter(nested, "opcode") > 500
