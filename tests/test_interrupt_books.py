# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""An exception from a signal handler, at chosen instants inside of our own calls."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_end,
    free_slots,
    has_ended,
    nothing,
    open_fds,
    pid,
    run_program,
    settle,
    steady_fds,
    wait_until,
)

from jobserver import Blocked, Jobserver, _callbacks
from jobserver._admission import Admission
from jobserver._launch import _hand_over, _remote
from jobserver._reactor import Reactor
from jobserver._signals import deferred
from jobserver._slots._pool import SlotPool
from jobserver._slots._section import new_fifo

if TYPE_CHECKING:
    import select
    from collections.abc import Iterator
    from pathlib import Path


class Interrupted(BaseException):
    """What the handler raises."""


def _raise(signum: int, frame: object) -> None:
    raise Interrupted


def interrupt() -> None:
    """Send this process the signal; where signals are deferred it is handled later."""
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """SIGUSR1 raises."""
    before = signal.signal(signal.SIGUSR1, _raise)
    yield
    signal.signal(signal.SIGUSR1, before)


def interrupted_after(monkeypatch: pytest.MonkeyPatch, owner: Any, *names: str) -> Any:
    """The next call of a function is followed by the signal; the block is left by the exception."""

    def patch(original: Callable[..., Any]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            monkeypatch.undo()
            found = original(*args, **kwargs)
            interrupt()
            return found

        return patched

    for name in names:
        monkeypatch.setattr(owner, name, patch(getattr(owner, name)))
    return pytest.raises(Interrupted)


@pytest.mark.contract("S18", "N5")
@pytest.mark.parametrize("tasks", [1, None])
def test_job_that_was_just_started_keeps_its_slot(
    method: str, tasks: int | None, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the job is in flight already, submit leaves it its slot."""
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        js.submit(nothing).wait(PATIENCE)
        with interrupted_after(monkeypatch, Reactor, "add", "assign"):
            js.submit(gate.enter)
        gate.await_entered(1)

        with pytest.raises(Blocked):
            js.submit(nothing, timeout=0)
        gate.open()
        settle(js)
        assert js.submit(nothing, timeout=0).wait(PATIENCE)


@pytest.mark.contract("S18")
def test_slot_that_was_just_taken_is_free_in_the_handler(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted with a slot in hand, submit gives it back at once, not with the traceback."""
    js = Jobserver("fork", 1)
    with interrupted_after(monkeypatch, SlotPool, "try_take") as caught:
        js.submit(nothing)
    try:
        raise caught.value
    except Interrupted:
        assert js.submit(nothing, timeout=0).wait(PATIENCE)
    settle(js)
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S18")
@pytest.mark.parametrize("tasks", [1, None])
def test_slot_between_taking_and_starting(
    tasks: int | None, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the slot is taken, submit gives it back at once, or to the job it starts."""
    with Jobserver("fork", 1, max_tasks_per_child=tasks) as js:
        js.submit(nothing).wait(PATIENCE)
        for _ in range(2):
            with interrupted_after(monkeypatch, Admission, "take") as caught:
                js.submit(nothing)
            try:
                raise caught.value
            except Interrupted:
                started = [*js._shared.reactor.running]
                assert len(started) == (0 if tasks == 1 else 1)
                assert all(future.wait(PATIENCE) for future in started)
                assert js.submit(nothing, timeout=0).wait(PATIENCE)
        settle(js)
        assert free_slots(js, gate) == 1


@pytest.mark.contract("S18", "N5")
def test_handing_over_interrupted_at_its_end(
    method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When handing a job over is interrupted, a worker that has heard all of it is ended."""
    with Jobserver(method, 1, max_tasks_per_child=None) as js:
        js.submit(nothing).wait(PATIENCE)
        with interrupted_after(monkeypatch, _hand_over, "send_job"):
            js.submit(gate.enter)

        worker = js.submit(pid, timeout=0).result(PATIENCE)
        settle(js)
        wait_until(lambda: all(map(has_ended, gate.entered())), "the worker to end")
        assert worker not in gate.entered()


@pytest.mark.contract("S18")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_delivery_interrupted_at_its_start(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between two steps of handing over the job, submit leaves no descriptor."""
    with Jobserver(method, 1, max_tasks_per_child=1) as js:
        js.submit(nothing).wait(PATIENCE)
        gc.collect()
        before = steady_fds(js)
        with interrupted_after(monkeypatch, _remote, "_tracker_fd"):
            js.submit(nothing)

        assert steady_fds(js) == before
        assert js.submit(nothing, timeout=0).wait(PATIENCE)


def test_interrupted_between_letting_through_and_the_block() -> None:
    """Signals are as before when an exception comes after they are let through, and nobody sees."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for _ in range(2):
        with pytest.raises(Interrupted), deferred() as signals:
            signals.lifted().__enter__()
            interrupt()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.contract("S18", "J1")
def test_construction_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted while it is made, a Jobserver leaves no descriptor."""
    gc.collect()
    before = len(open_fds())
    with interrupted_after(monkeypatch, os, "pipe"):
        Jobserver("fork", 2)

    gc.collect()
    assert len(open_fds()) == before


@pytest.mark.contract("F13", "F22")
def test_callbacks_interrupted_before_they_begin(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted with a finished Future in hand, an observer leaves its callbacks to the next."""
    js = Jobserver("fork", 2, max_tasks_per_child=1)
    called: list[int] = []
    futures = [js.submit(gate.enter) for _ in range(2)]
    for number, future in enumerate(futures):
        future.when_done(called.append, number)
    workers = gate.await_entered(2)
    gate.open()
    for worker in workers:
        await_end(worker)

    with interrupted_after(monkeypatch, _callbacks, "_next"):
        js.reclaim_resources()
    assert called == []

    js.reclaim_resources()
    assert sorted(called) == [0, 1]


@pytest.mark.contract("F22")
def test_callback_interrupted() -> None:
    """What interrupts a callback passes through; those after it are for the next observer."""
    js = Jobserver("fork", 1)
    called: list[str] = []
    future = js.submit(nothing)
    for callback in (lambda: called.append("first"), interrupt, lambda: called.append("last")):
        future.when_done(callback)

    with pytest.raises(Interrupted):
        future.wait(PATIENCE)
    assert called == ["first"]
    assert future.wait(0)
    assert called == ["first", "last"]
    future.when_done(called.append, "later")
    assert called == ["first", "last", "later"]


class _Poller:
    """An epoll that is interrupted right after it has seen something."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.interrupts = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)

    def poll(self, timeout: float | None) -> Any:
        found = self._epoll.poll(timeout)
        if found and self.interrupts:
            self.interrupts = False
            interrupt()
        return found


def test_event_that_was_seen_and_not_heeded() -> None:
    """What an interrupted wait has seen, the next one sees again."""
    js = Jobserver("fork", 1)
    reactor = js._shared.reactor
    fifo = new_fifo(1)
    os.write(fifo, b"!")
    poller: Any = _Poller(reactor.poller.get())
    reactor.poller.epoll = poller
    with pytest.raises(Interrupted):
        reactor.wait(lambda: False, time.monotonic() + PATIENCE, arm=(fifo,))
    tests = iter((False, True))

    assert reactor.wait(lambda: next(tests), time.monotonic() + PATIENCE, arm=(fifo,))

    reactor.poller.epoll = poller._epoll
    reactor.disarm(fifo)
    os.close(fifo)


NESTED = """
import os, signal, sys, time
from pathlib import Path
from jobserver import Jobserver
from helpers import PATIENCE, Gate, await_end, free_slots, nothing, process_state, wait_until

class Interrupted(Exception):
    pass

def interrupted(signum, frame):
    raise Interrupted

def top(js, first, second):
    return js.submit(middle, args=(js, first, second)).result()

def middle(js, first, second):
    signal.signal(signal.SIGUSR1, interrupted)
    second.enter()
    try:
        js.submit(first.enter)
    except Interrupted:
        pass
    else:
        raise AssertionError("not interrupted")
    first.open()
    # The child's slot comes back to the pool, where the top job waits for one.
    wait_until(lambda: (js.reclaim_resources(), "tracked=0" in repr(js))[1], "the child's end")
    wait_until(lambda: not js._shared.slots.free(), "the top job to take the slot")
    js.submit(nothing).wait()
    return "went on"

if __name__ == "__main__":
    method, *directories = sys.argv[1:]
    first, second, third = (Gate(Path(directory)) for directory in directories)
    js = Jobserver(method, 1)
    future = js.submit(top, args=(js, first, second))
    (pid,) = second.await_entered(1)
    second.open()
    first.await_entered(1)
    os.kill(pid, signal.SIGUSR1)
    print(future.result(PATIENCE))
    print(free_slots(js, third))
"""


@pytest.mark.contract("N3", "S18")
def test_job_interrupted_after_lending(
    method: str, tmp_path: Path, make_gate: Callable[[], Gate]
) -> None:
    """A job that an exception took out of submit without its slot does not starve in the next."""
    script = tmp_path / "program.py"
    script.write_text(NESTED)
    gates = [make_gate().directory for _ in range(3)]

    done = run_program([str(script), method, *gates])

    assert (done.stdout, done.stderr) == ("went on\n1\n", "")
