# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Forks by the program itself, at any moment and in any thread, leave parent and child usable."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Callable, Optional

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    has_ended,
    identity,
    nothing,
    open_fds,
    run_program,
    wait_until,
    worker_pid,
)

from jobserver import Jobserver, JobserverExecutor, SubmissionDied, _forking
from jobserver._launch import _fork
from jobserver._reactor import Reactor
from jobserver._slots import _section

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Children:
    """Raw forks of this process, all killed at the end of the test."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def fork(self, action: Callable[[], object]) -> int:
        """Run an action in a forked child, which then exits with 0, or with 1 if it raised.

        The child's fork hooks have run when this returns.
        """
        reader, writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(writer)
            os.read(reader, 1)
            os.close(reader)
            self.pids.append(pid)
            return pid
        status = 1
        try:
            signal.alarm(60)  # a child that hangs must not outlive the test run
            os.write(writer, b"!")
            os.close(writer)
            os.close(reader)
            action()
            status = 0
        finally:
            os._exit(status)

    def staying(self) -> int:
        """A child that stays."""
        return self.fork(signal.pause)

    def status(self, pid: int) -> int:
        """Wait for a child to end by itself; its exit status, or minus a signal."""
        wait_until(lambda: has_ended(pid), "the forked child to end")
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def children() -> Iterator[Children]:
    """Makes raw forks."""
    made = Children()
    yield made
    made.end()


def free(js: Jobserver) -> int:
    """How many slots are free at this instant."""
    return js._shared.slots.free()


# What a child can do


@pytest.mark.contract("H13", "H6")
def test_child_uses_what_it_inherits(method: str, children: Children, gate: Gate) -> None:
    """A forked child submits through an inherited Jobserver, within the same slots."""
    with Jobserver(method, 2) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)

        def in_child() -> None:
            assert repr(js) == f"Jobserver('{method}', tracked=0)"
            assert js.submit(add, args=(1, 2)).result(PATIENCE) == 3
            assert free(js) == 1
            inner = js.submit(nothing)
            assert inner.wait(PATIENCE)

        assert children.status(children.fork(in_child)) == 0
        assert not future.done()
        gate.open()
        assert future.result(PATIENCE)
        assert free(js) == 2


@pytest.mark.contract("H13")
def test_child_makes_its_own(method: str, children: Children, gate: Gate) -> None:
    """A forked child makes a Jobserver of its own."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)

        def in_child() -> None:
            with Jobserver(method, 1) as own:
                assert own.submit(identity, args=(4,)).result(PATIENCE) == 4
            if method == "fork":
                with JobserverExecutor(1) as executor:
                    assert executor.submit(add, 2, 3).result(PATIENCE) == 5

        assert children.status(children.fork(in_child)) == 0
        gate.open()
        assert future.result(PATIENCE)


@pytest.mark.contract("H7", "F23")
def test_futures_in_flight_are_the_parents(children: Children, gate: Gate) -> None:
    """A Future in flight raises RuntimeError in a forked child; one that is done is done there."""
    with Jobserver("fork", 2) as js:
        done = js.submit(identity, args=(7,))
        assert done.result(PATIENCE) == 7
        future = js.submit(gate.enter)
        seen: list[int] = []
        future.when_done(seen.append, 1)

        def in_child() -> None:
            assert done.result(0) == 7
            calls: list[Callable[[], Any]] = [future.result, future.wait, future.done]
            calls.append(lambda: future.result(0))
            for call in calls:
                with pytest.raises(RuntimeError, match="process forked"):
                    call()
            js.reclaim_resources()
            assert not seen

        assert children.status(children.fork(in_child)) == 0
        assert not future.done()
        gate.open()
        assert future.result(PATIENCE)
        assert seen == [1]


def test_child_cannot_signal_the_parents_job(children: Children, gate: Gate) -> None:
    """A signal sent through an inherited Future reaches nobody."""
    with Jobserver("fork", 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)

        def in_child() -> None:
            with pytest.raises(RuntimeError):
                future.wait(0, signal=signal.SIGKILL)

        assert children.status(children.fork(in_child)) == 0
        gate.open()
        assert future.result(PATIENCE)


def test_child_ends_without_waiting_for_the_parents_jobs(tmp_path: Path) -> None:
    """A forked child that ends as programs do does not wait for what its parent has in flight."""
    script = tmp_path / "program.py"
    script.write_text(
        """
import os, sys, time
from jobserver import Jobserver
js = Jobserver("fork", 2)
future = js.submit(time.sleep, args=(60,))
other = js.submit(os.getpid)
pid = os.fork()
if pid == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), other.result() > 0, flush=True)
future.wait(signal=9)
"""
    )
    done = run_program(["-W", "error", str(script)], timeout=30)

    assert done.stdout == "7 True\n"
    assert done.stderr == ""


# At any moment, in any thread


@pytest.mark.contract("H13", "F23")
@pytest.mark.parametrize(("method", "rounds"), [("fork", 25), ("forkserver", 15), ("spawn", 3)])
def test_forks_while_others_submit(method: str, rounds: int, children: Children) -> None:
    """Threads submit, wait and fork at once: children use the Jobserver, all results come."""
    stop = threading.Event()
    errors: list[BaseException] = []
    counts = [0, 0]

    def submitting(js: Jobserver, number: int) -> None:
        try:
            while not stop.is_set():
                assert js.submit(add, args=(number, 1)).result(PATIENCE) == number + 1
                counts[number] += 1
        except BaseException as error:
            errors.append(error)

    def in_child() -> None:
        assert js.submit(identity, args=(3,), timeout=PATIENCE).result(PATIENCE) == 3

    with Jobserver(method, 2) as js:
        threads = [threading.Thread(target=submitting, args=(js, n)) for n in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(rounds):
                assert children.status(children.fork(in_child)) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not errors
        assert all(counts)
        wait_until(lambda: js._shared.slots.sweep() or free(js) == 2)


@pytest.mark.contract("H13")
def test_forks_from_many_threads(children: Children) -> None:
    """Several threads fork at once, and all slots are there in the end."""
    errors: list[BaseException] = []

    def forking() -> None:
        try:
            for _ in range(8):
                assert children.status(children.fork(lambda: js.submit(nothing).wait())) == 0
                assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
        except BaseException as error:
            errors.append(error)

    with Jobserver("fork", 2) as js:
        threads = [threading.Thread(target=forking) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE * 2)
        assert not errors
        wait_until(lambda: js._shared.slots.sweep() or free(js) == 2)


def test_fork_inside_a_callback(children: Children) -> None:
    """A callback may fork: the child is inside the callback, and can use the Jobserver."""
    with Jobserver("fork", 1) as js:
        found: list[int] = []

        def callback() -> None:
            found.append(children.fork(lambda: js.submit(identity, args=(1,)).result(PATIENCE)))

        future = js.submit(nothing)
        future.when_done(callback)
        assert future.wait(PATIENCE)
        assert children.status(found[0]) == 0


class ForkOnce:
    """Wraps a function of the library: another thread forks in the middle of its first call."""

    def __init__(self, function: Callable[..., Any], children: Children) -> None:
        self.function = function
        self.children = children
        self.pid = 0
        self.thread: Optional[threading.Thread] = None

    def __call__(self, *args: Any) -> Any:
        result = self.function(*args)
        if self.thread is None:
            self.thread = threading.Thread(target=self._fork)
            self.thread.start()
            # Where a fork must not happen now the thread is held up, else it is done by then.
            self.thread.join(0.3)
        return result

    def _fork(self) -> None:
        self.pid = self.children.staying()


@pytest.mark.contract("S18", "H13")
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (_section, "lock"),
        (_section, "_moved"),
        (Reactor, "add"),
        (_fork, "open_pidfd"),
    ],
)
def test_fork_amid_a_launch(
    owner: Any, name: str, children: Children, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child forked by another thread amid a launch keeps neither the slot nor the channel."""
    with Jobserver("fork", 1) as js:
        fork = ForkOnce(getattr(owner, name), children)
        # A function, as a method of a class is bound, and an object is not.
        monkeypatch.setattr(owner, name, lambda *args: fork(*args))  # noqa: PLW0108
        future = js.submit(gate.enter)
        assert fork.thread is not None
        fork.thread.join(PATIENCE)
        assert not has_ended(fork.pid)
        gate.await_entered(1)
        # The child has nothing of ours once its hooks have run.
        wait_until(lambda: not _lease_in(fork.pid, js), "the child to let go")

        os.kill(worker_pid(future), signal.SIGKILL)
        with pytest.raises(SubmissionDied):
            future.result(PATIENCE)

        assert free(js) == 1
        assert not has_ended(fork.pid)


def _lease_in(pid: int, js: Jobserver) -> bool:
    """Whether a process has more descriptors of one berth than the pool's own."""
    names = [name for name in open_fds(pid).values() if name.startswith("pipe:")]
    ours = {
        f"pipe:[{os.fstat(fd).st_ino}]" for part in js._shared.slots.sections for fd in part.berths
    }
    return any(names.count(name) > 1 for name in ours)


# What a child does not keep


def kinds_of_ours(pid: int) -> list[str]:
    """A process's pidfds and epolls."""
    return [what for what in open_fds(pid).values() if "pidfd" in what or "eventpoll" in what]


@pytest.mark.contract("S18")
def test_child_has_no_descriptors_of_jobs(method: str, children: Children, gate: Gate) -> None:
    """A forked child has neither channels nor pidfds nor leases of its parent's jobs."""
    with Jobserver(method, 2) as js:
        futures = [js.submit(gate.enter) for _ in range(2)]
        gate.await_entered(2)
        ours = set(_forking.owned) | js._shared.slots.held_fds
        here = open_fds()
        before = {fd: here[fd] for fd in ours}
        assert len(before) >= 6

        pid = children.staying()
        there = open_fds(pid)

        assert not [fd for fd, what in before.items() if there.get(fd) == what]
        assert not kinds_of_ours(pid)
        gate.open()
        for future in futures:
            future.result(PATIENCE)


@pytest.mark.contract("F9", "F26")
def test_killed_job_is_noticed_while_a_fork_lives(
    method: str, children: Children, gate: Gate
) -> None:
    """Neither a death nor the slot of the dead is held up by a child that was forked meanwhile."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)
        children.staying()

        future.wait(PATIENCE, signal=signal.SIGKILL)

        assert free(js) == 1
        assert js.submit(identity, args=(1,), timeout=0).result(PATIENCE) == 1


def leave_a_fork(js: Jobserver, path: str, use: bool) -> None:
    """A job with a raw fork of its own, which lives on; then the job waits to be killed."""
    if use:
        js.submit(nothing).wait()
    if os.fork() == 0:
        with open(path + ".part", "w") as stream:
            stream.write(str(os.getpid()))
        os.rename(path + ".part", path)
        signal.alarm(60)
        signal.pause()
        os._exit(0)
    while True:
        signal.pause()


@pytest.mark.contract("S18", "F26")
@pytest.mark.parametrize("use", [False, True], ids=["unused", "used"])
def test_grandchild_does_not_keep_the_slot(method: str, use: bool, tmp_path: Path) -> None:
    """What a killed job has forked has no part in its slot, and does not hide its death."""
    path = tmp_path / "pid"
    with Jobserver(method, 2) as js:
        future = js.submit(leave_a_fork, args=(js, str(path), use))
        wait_until(path.exists, "the grandchild")
        grandchild = int(path.read_text())
        try:
            assert future.wait(PATIENCE, signal=signal.SIGKILL)
            assert not has_ended(grandchild)
            wait_until(lambda: js._shared.slots.sweep() or free(js) == 2, "the slot")
            assert not has_ended(grandchild)
        finally:
            os.kill(grandchild, signal.SIGKILL)
        wait_until(lambda: has_ended(grandchild))


def fork_and_submit(js: Jobserver) -> tuple[int, int]:
    """In a job: a raw fork submits through the job's handle, then the job itself does."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, b"%d" % js.submit(add, args=(1, 2)).result(PATIENCE))
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 10)
    os.close(reader)
    os.waitpid(pid, 0)
    return int(said or -1), js.submit(add, args=(3, 4)).result()


@pytest.mark.contract("H6", "H13")
def test_fork_inside_a_job(method: str) -> None:
    """A raw fork of a job may submit, as a process without a slot; the job goes on as before."""
    with Jobserver(method, 2) as js:
        assert js.submit(fork_and_submit, args=(js,)).result(PATIENCE) == (3, 7)
        assert free(js) == 2
