# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Crashes: each way to end badly, at each moment of a worker's life, fresh and warm."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import METHODS, PATIENCE, Gate, has_ended, identity, pid, settle, touch, wait_until
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from warm_jobs import Bomb, explode_later, leave_explosive, set_off, swallow

from jobserver import Blocked, Jobserver, SubmissionDied

if TYPE_CHECKING:
    from jobserver import Future

HOWS = {"SIGKILL": -signal.SIGKILL, "os._exit": 7, "sys.exit": 7, "exception": None}


def end_of(future: Future[Any]) -> Any:
    """The exception with which a job has ended, or its result."""
    try:
        return future.result(PATIENCE)
    except Exception as error:
        return error


def crash(js: Jobserver, how: str, when: str, gate: Gate) -> Any:
    """Run the job that ends in that way at that moment; how it has ended."""
    me = os.getpid()
    if when == "unpickling":
        return end_of(js.submit(swallow, args=(Bomb(how, when, me),)))
    if when == "retiring":
        return end_of(js.submit(leave_explosive, args=(how,)))
    if when == "resting":
        worker = js.submit(explode_later, args=(how, gate)).result(PATIENCE)
        gate.open()
        if js._shared.tasks == 1 or how in ("SIGKILL", "os._exit"):
            wait_until(lambda: has_ended(worker), "the worker to end")
        return worker
    return end_of(js.submit(set_off, args=(how, when, me)))


@pytest.mark.contract("W1", "F9", "F10", "F11", "F25", "S18")
@pytest.mark.parametrize("when", ["unpickling", "fn", "pickling", "resting", "retiring"])
@pytest.mark.parametrize("tasks", [1, None])
@pytest.mark.parametrize("method", METHODS)
def test_crashes(method: str, tasks: int | None, when: str, make_gate: Callable[[], Gate]) -> None:
    """A crash is told to the job whose it is, costs no slot, and concerns no other job."""
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        for how, exitcode in HOWS.items():
            if tasks is None:
                js.submit(pid).result(PATIENCE)  # who is then at rest
            found = crash(js, how, when, make_gate())
            harmless = when == "resting" or (method, tasks, when) == ("fork", 1, "unpickling")
            if harmless or (when, how) == ("retiring", "exception"):
                assert isinstance(found, int)
            elif how != "exception":
                assert isinstance(found, SubmissionDied)
                assert found.exitcode == exitcode
            else:
                assert type(found) is LookupError or "on purpose" in str(found)
            assert js._shared.slots.free() == 1
            assert js.submit(identity, args=(how,), timeout=PATIENCE).result(PATIENCE) == how


class Life(RuleBasedStateMachine):
    """Jobs come, stay, are killed and end; workers at rest are killed, too."""

    slots = 2

    def __init__(self) -> None:
        super().__init__()
        self.staying: list[tuple[Future[Any], Gate]] = []
        self.stack = contextlib.ExitStack()

    @initialize(method=st.sampled_from(["fork", "forkserver"]), tasks=st.sampled_from([None, 2]))
    def begin(self, method: str, tasks: int | None) -> None:
        """Make a Jobserver."""
        import tempfile

        self.directory = self.stack.enter_context(tempfile.TemporaryDirectory())
        self.js = Jobserver(method, self.slots, max_tasks_per_child=tasks)
        self.stack.enter_context(self.js)
        self.count = 0

    def gate(self) -> Gate:
        """Return a new gate."""
        from pathlib import Path

        self.count += 1
        path = Path(self.directory, str(self.count))
        path.mkdir()
        return Gate(path)

    @property
    def full(self) -> bool:
        """Whether all slots are in use."""
        return len(self.staying) == self.slots

    @rule()
    def submit_staying(self) -> None:
        """A job takes a slot, or finds none."""
        gate = self.gate()
        if self.full:
            with pytest.raises(Blocked):
                self.js.submit(gate.enter, timeout=0)
        else:
            self.staying.append((self.js.submit(gate.enter, timeout=PATIENCE), gate))

    @precondition(lambda self: not self.full)
    @rule(value=st.integers())
    def run_short(self, value: int) -> None:
        """A job ends at once."""
        assert self.js.submit(identity, args=(value,), timeout=PATIENCE).result(PATIENCE) == value

    @precondition(lambda self: not self.full)
    @rule()
    def forget_short(self) -> None:
        """A job whose Future nobody holds leaves its mark."""
        path = os.path.join(self.directory, "mark")
        self.js.submit(touch, args=(path,), timeout=PATIENCE)
        wait_until(lambda: os.path.exists(path), "the mark")
        os.unlink(path)

    @precondition(lambda self: self.staying)
    @rule(last=st.booleans(), early=st.booleans())
    def kill_staying(self, last: bool, early: bool) -> None:
        """A job is killed, perhaps before it has begun."""
        future, gate = self.staying.pop(-1 if last else 0)
        if not early:
            gate.await_entered(1)
        assert future.wait(PATIENCE, signal=signal.SIGKILL)
        with pytest.raises(SubmissionDied):
            future.result()

    @precondition(lambda self: self.staying)
    @rule(last=st.booleans())
    def end_staying(self, last: bool) -> None:
        """A job ends as it should."""
        future, gate = self.staying.pop(-1 if last else 0)
        gate.open()
        assert future.result(PATIENCE) == gate.await_entered(1)[0]

    @rule(wait=st.booleans())
    def kill_resting(self, wait: bool) -> None:
        """A worker at rest is killed; perhaps nobody has noticed when the next job comes."""
        for flight in self.js._shared.reactor.crew._resting[-1:]:
            with contextlib.suppress(ProcessLookupError):  # killed before, and reaped by the zygote
                os.kill(flight.pid, signal.SIGKILL)
            # A job that is handed over while the worker dies is that worker's last one.
            wait_until(lambda pid=flight.pid: has_ended(pid), "the worker to die")  # type: ignore[misc]
        if wait:
            self.js.reclaim_resources()

    @rule()
    def reclaim(self) -> None:
        """Take note of what has ended."""
        self.js.reclaim_resources()

    @invariant()
    def holds(self) -> None:
        """Who stays, stays; no more workers rest than there are slots."""
        if hasattr(self, "js"):
            assert not any(future.done() for future, _ in self.staying)
            assert len(self.js._shared.reactor.crew) <= self.slots
            assert self.js._shared.slots.free() <= self.slots - len(self.staying)

    def teardown(self) -> None:
        """All slots come back."""
        if hasattr(self, "js"):
            for _, gate in self.staying:
                gate.open()
            for future, _ in self.staying:
                future.result(PATIENCE)
            settle(self.js)  # of those, too, that nobody holds
            assert self.js._shared.slots.free() == self.slots
            self.stack.close()


@pytest.mark.contract("W1", "W5", "S3", "F25")
class TestLife(Life.TestCase):  # type: ignore[misc, valid-type]
    """Whatever happens to workers, each job is told how it ended, and all slots come back."""

    settings = settings(
        max_examples=12,
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
