# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Warm workers: one process, many jobs, each of which finds what a fresh one would."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    add,
    die,
    fail,
    getenv,
    hard_exit,
    has_ended,
    identity,
    nothing,
    open_fds,
    pid,
    soft_exit,
    wait_until,
)
from marks import by_method
from warm_jobs import (
    Bomb,
    answer_elsewhere,
    close_stdout,
    count_fds,
    do_nothing,
    fill_queue,
    leave_daemon,
    leave_fork,
    leave_process,
    leave_thread_pool,
    look,
    make_a_mess,
    pickled_size,
    raises,
    receive_all,
    remove_directory_below,
    replace_environment,
    set_default_timeout,
    use_lock,
    wrap,
)

from jobserver import Jobserver, SubmissionDied

if TYPE_CHECKING:
    from pathlib import Path

    from helpers import Gate


def warm(method: str, slots: int = 1, **options: Any) -> Jobserver:
    """A Jobserver whose workers run any number of jobs."""
    return Jobserver(method, slots, max_tasks_per_child=None, **options)


def run(js: Jobserver, fn: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Submit and wait."""
    return js.submit(fn, args=args, timeout=PATIENCE, **options).result(PATIENCE)


# Which worker


@pytest.mark.contract("J13", "W1")
def test_successive_jobs_share_a_process(method: str) -> None:
    """One job after the other runs in the same worker, whatever handle it is submitted by."""
    with warm(method) as js:
        sibling = js.replace(env={"JOBSERVER_T": "sibling"})
        pids = {run(handle, pid) for handle in (js, sibling, js, sibling)}
        assert run(sibling, getenv, "JOBSERVER_T") == ["sibling"]
        assert run(js, getenv, "JOBSERVER_T") == [None]
    assert len(pids) == 1
    assert os.getpid() not in pids


@pytest.mark.contract("W6")
def test_last_come_first_served(method: str, make_gate: Callable[[], Gate]) -> None:
    """The worker that came to rest last gets the next job, so that the others may grow old."""
    gates = make_gate(), make_gate()
    with warm(method, 2) as js:
        futures = [js.submit(gate.enter) for gate in gates]
        workers = [gate.await_entered(1)[0] for gate in gates]
        for number in (1, 0):
            gates[number].open()
            futures[number].result(PATIENCE)
        assert [run(js, pid) for _ in range(3)] == [workers[0]] * 3


@pytest.mark.contract("J13")
@by_method("tasks", [2, 1, 3])
def test_worker_ends_with_its_last_task(method: str, tasks: int) -> None:
    """A worker runs max_tasks_per_child jobs and not one more."""
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        pids = [run(js, pid) for _ in range(2 * tasks + 1)]
    assert [pids.index(each) // tasks for each in pids] == [n // tasks for n in range(len(pids))]


@pytest.mark.contract("J14")
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError), ("2", TypeError)],
)
def test_bad_numbers_of_tasks(value: Any, error: type[Exception]) -> None:
    """max_tasks_per_child that is no int is a TypeError, one below 1 a ValueError."""
    with pytest.raises(error, match="max_tasks_per_child"):
        Jobserver("fork", 1, max_tasks_per_child=value)


# What a job finds


@pytest.mark.contract("W2")
def test_what_a_job_changes_is_undone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job finds the environment and the directory of the submitter again."""
    monkeypatch.setenv("JOBSERVER_T_KEPT", "kept")
    with warm(method) as js:
        before = run(js, look)
        during = run(js, make_a_mess, str(tmp_path), env={"JOBSERVER_T_OWN": "1"})
        assert during["environ"] == {"JOBSERVER_T": "left behind", "JOBSERVER_T_OWN": "1"}
        assert during["dir"] == str(tmp_path)
        assert run(js, look) == before
        assert run(js, getenv, "JOBSERVER_T_KEPT", env={"JOBSERVER_T_KEPT": None}) == [None]
        assert run(js, look) == before
    assert before["environ"] == {"JOBSERVER_T_KEPT": "kept"}


@pytest.mark.contract("W2")
def test_directory_that_is_gone(method: str, tmp_path: Path) -> None:
    """A job that removes the directory it is in does not take it from the next one."""
    with warm(method) as js:
        (tmp_path / "below").mkdir()
        worker = run(js, remove_directory_below, str(tmp_path / "below"))
        found = run(js, look)
    assert found["dir"] == os.getcwd()
    assert found["pid"] == worker


@pytest.mark.contract("W2")
def test_what_the_submitter_changes_is_seen(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job finds the submitter's environment, directory, path and arguments of this moment."""
    with warm(method) as js:
        first = run(js, look)
        monkeypatch.setenv("JOBSERVER_T", "\udcff")
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend("/elsewhere")
        monkeypatch.setattr(sys, "argv", ["other", "words"])
        second = run(js, look)
        monkeypatch.delenv("JOBSERVER_T")
        third = run(js, look)
    assert {first["pid"]} == {second["pid"], third["pid"]}
    assert first["environ"] == third["environ"] == {}
    assert second["environ"] == {"JOBSERVER_T": "\udcff"}
    for found in (second, third):
        assert found["dir"] == str(tmp_path)
        assert found["path"][0] == "/elsewhere"
        assert found["argv"] == ["other", "words"]


@pytest.mark.contract("W3")
def test_preexec_fn_ends_its_worker(method: str) -> None:
    """What a plain preexec_fn has done can be undone by nobody; a context manager undoes itself."""
    with warm(method) as js:
        workers = [
            run(js, pid, preexec_fn=preexec) for preexec in (None, wrap, None, do_nothing, None)
        ]
    assert len(set(workers[:4])) == 1
    assert workers[4] != workers[3]


# How jobs end


@pytest.mark.contract("W1", "F9", "F25")
@by_method(
    "fn, arg",
    [(die, signal.SIGKILL), (hard_exit, 3), (soft_exit, 3), (raises, KeyboardInterrupt)],
)
def test_death_of_a_worker_is_that_of_one_job(
    method: str, fn: Callable[..., Any], arg: Any
) -> None:
    """A job that ends its worker is told so; those before and after it are not concerned."""
    with warm(method, 2) as js:
        futures = [
            js.submit(one, args=args) for one, *args in ((add, 1, 2), (fn, arg), (add, 3, 4))
        ]
        assert [futures[0].result(PATIENCE), futures[2].result(PATIENCE)] == [3, 7]
        with pytest.raises(SubmissionDied):
            futures[1].result(PATIENCE)
        assert [run(js, identity, n) for n in range(3)] == [0, 1, 2]


@pytest.mark.contract("W1")
def test_exceptions_end_no_worker(method: str) -> None:
    """A job that raises leaves its worker to the next one."""
    with warm(method) as js:
        worker = run(js, pid)
        with pytest.raises(LookupError, match="on purpose"):
            run(js, fail, LookupError, "on purpose")
        assert run(js, pid) == worker


@pytest.mark.contract("F3", "W1")
def test_signal_hits_no_other_job(method: str) -> None:
    """A signal for a job that is just ending never ends the job after it in the same worker."""
    died = 0
    with warm(method) as js:
        for number in range(10 if method == "spawn" else 60):
            future = js.submit(identity, args=(number,), timeout=PATIENCE)
            if number % 3:
                # About as long as the job takes, or none at all.
                future.wait(number % 7 * 1e-4)
            future.wait(0, signal=signal.SIGTERM)
            following = js.submit(identity, args=(-number,), timeout=PATIENCE)
            try:
                assert future.result(PATIENCE) == number
            except SubmissionDied as death:
                assert death.exitcode == -signal.SIGTERM  # noqa: PT017
                died += 1
            assert following.result(PATIENCE) == -number
    assert died


@pytest.mark.contract("F3", "W1")
def test_interrupt_hits_the_job_it_is_for(method: str, gate: Gate) -> None:
    """SIGINT for a job that was just handed over ends that job, also if it has not begun."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or it may be ignored
    try:
        interrupt_jobs(method, gate)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupt_jobs(method: str, gate: Gate) -> None:
    """Interrupt one job after the other, and run another one after each."""
    with warm(method) as js:
        run(js, pid)
        for number in range(5 if method == "spawn" else 30):
            future = js.submit(gate.enter, timeout=PATIENCE)
            with pytest.raises(SubmissionDied):
                assert future.wait(PATIENCE / 2, signal=signal.SIGINT)
                future.result()
            assert run(js, identity, number) == number


@pytest.mark.contract("W4")
def test_unpicklable_jobs_are_forked() -> None:
    """Under fork, a job that cannot be pickled runs all the same, in a worker of its own."""
    with warm("fork") as js:
        first = run(js, pid)
        assert run(js, lambda: pid()) != first  # noqa: PLW0108
        lock = threading.Lock()
        assert run(js, lambda: lock.acquire(blocking=False)) is True
        assert run(js, add, 1, 2) == 3


def define(monkeypatch: pytest.MonkeyPatch, source: str) -> Any:
    """Define a thing in the main module, as a line in an interactive session does."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(source, names)
    thing = names["thing"]
    monkeypatch.setattr(sys.modules["__main__"], "thing", thing, raising=False)
    return thing


@pytest.mark.contract("W4", "W1")
@pytest.mark.parametrize("tasks", [1, None])
def test_definitions_after_the_fork(tasks: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under fork a job calls what its names stand for at submission, also in a warm worker."""
    with Jobserver("fork", 1, max_tasks_per_child=tasks) as js:
        run(js, pid)
        first = define(monkeypatch, "def thing(): return 'first', __import__('os').getpid()")
        workers = [run(js, first) for _ in range(3)]
        second = define(monkeypatch, "def thing(): return 'second', __import__('os').getpid()")
        workers += [run(js, second) for _ in range(3)]
        assert [name for name, _ in workers] == ["first"] * 3 + ["second"] * 3
        if tasks is None:
            assert len({worker for _, worker in workers}) == 2
        kind = define(monkeypatch, "class thing: value = 3")
        assert run(js, getattr, kind(), "value") == 3
        mapped = define(monkeypatch, "def thing(n): return n * 7")
        assert list(js.map(mapped, [(1,), (2,)])) == [7, 14]
        assert list(js.map(functools.partial(mapped, 3), [()])) == [21]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_unpicklable_jobs_are_refused(method: str) -> None:
    """Without fork such a job is refused, and the worker at rest goes on resting."""
    with warm(method) as js:
        worker = run(js, pid)
        with pytest.raises(TypeError, match=method):
            js.submit(lambda: 1)
        assert run(js, pid) == worker


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.parametrize("kind", ["Lock", "Condition", "Queue"])
def test_locks_for_later_jobs(context: str, kind: str) -> None:
    """Under fork a lock of any context can be given to a worker that was forked before it."""
    js = warm("fork")
    run(js, nothing)
    thing = getattr(multiprocessing.get_context(context), kind)()
    if kind == "Queue":
        run(js, fill_queue, thing, 10)
        assert thing.get(timeout=PATIENCE) == "x" * 10
        thing.close()
    else:
        run(js, use_lock, thing)
        assert thing.acquire(timeout=PATIENCE)
        thing.release()


# What jobs leave behind


@pytest.mark.contract("W1")
@by_method("leave, ends", [(leave_thread_pool, True), (leave_daemon, False), (leave_process, True)])
def test_what_a_job_leaves_running(method: str, leave: Callable[[], int], ends: bool) -> None:
    """A job answers when what it has left is done; what only a process's end finishes, ends it."""
    with warm(method) as js:
        worker = run(js, leave)
        assert (run(js, pid) != worker) == ends


@pytest.mark.contract("W1")
def test_queue_is_flushed_before_the_answer(method: str) -> None:
    """What a job has put into a queue is on its way when its result is there, as in a fresh one."""
    queue = multiprocessing.get_context("spawn").Queue()
    size = 30_000
    with warm(method) as js:
        for _ in range(2):
            worker = run(js, fill_queue, queue, size)
            assert has_ended(worker) or run(js, pid) != worker
            assert len(queue.get_nowait()) == size
    queue.close()


@pytest.mark.contract("W7")
def test_child_left_by_fork(method: str, gate: Gate) -> None:
    """A process that a job has forked and left holds up neither its worker nor the closing."""
    with warm(method) as js:
        worker = run(js, leave_fork, gate)
        assert run(js, pid) == worker
    wait_until(lambda: has_ended(worker), "the worker to end")
    gate.open()


@pytest.mark.contract("W1")
def test_closed_stdout_ends_the_worker(method: str) -> None:
    """The next job finds a stdout that it can print to."""
    with warm(method) as js:
        worker = run(js, close_stdout)
        assert run(js, pid) != worker


@pytest.mark.contract("W1", "W2")
def test_environment_replaced(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a job nor the program that replaces os.environ itself fails for that."""
    with warm(method) as js:
        worker = run(js, replace_environment)
        assert run(js, pid) != worker
        monkeypatch.setattr(os, "environ", {**os.environ, "JOBSERVER_T": "mine"})
        assert run(js, getenv, "JOBSERVER_T") == ["mine"]
        assert run(js, getenv, "JOBSERVER_T") == ["mine"]


@pytest.mark.contract("W1")
def test_default_timeout_of_sockets(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default timeout for sockets, set here or by a job, is not one for workers at rest."""
    with warm(method) as js:
        worker = run(js, set_default_timeout)
        threading.Event().wait(0.1)
        assert run(js, pid) == worker
    monkeypatch.setattr(socket, "setdefaulttimeout", socket.setdefaulttimeout)
    socket.setdefaulttimeout(0.05)
    try:
        with warm(method) as js:
            assert run(js, pid) == run(js, pid)
    finally:
        socket.setdefaulttimeout(None)


# What travels


@pytest.mark.contract("W1")
def test_large_arguments_of_later_jobs(method: str) -> None:
    """A job of any size reaches a worker at rest."""
    with warm(method) as js:
        run(js, nothing)
        for size in (1 << 16, 3 << 20):
            assert run(js, pickled_size, [b"x" * size, bytearray(size)]) >= 2 * size
            assert run(js, identity, b"y" * size) == b"y" * size


@pytest.mark.contract("W1")
def test_many_descriptors_for_later_jobs(method: str) -> None:
    """More descriptors than one message can carry come along with a later job, in order."""
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(260)]
    with warm(method) as js:
        run(js, nothing)
        before = run(js, count_fds)
        for number, (_, writer) in enumerate(pipes):
            writer.send(number)
        assert run(js, receive_all, [reader for reader, _ in pipes]) == list(range(260))
        gc.collect()
        assert run(js, count_fds) == before
    for pipe in pipes:
        for connection in pipe:
            connection.close()


@pytest.mark.contract("W1", "F9")
@by_method("before", [2, 0])
def test_channel_replaced_by_another_socket(method: str, before: int) -> None:
    """A job that puts another socket in the place of its channel has died; nothing goes there."""
    ours, theirs = multiprocessing.Pipe()
    with warm(method) as js:
        for number in range(before):
            assert run(js, identity, number) == number
        with pytest.raises(SubmissionDied):
            run(js, answer_elsewhere, theirs)
        assert run(js, identity, "next") == "next"
    theirs.close()
    with pytest.raises(EOFError):
        ours.recv_bytes()
    ours.close()


@pytest.mark.contract("W1")
def test_descriptors_do_not_grow(method: str) -> None:
    """Neither here nor in the worker does a job leave a descriptor."""
    with warm(method, 2) as js:
        counts = []
        for _ in range(3):
            with pytest.raises(LookupError):
                run(js, fail, LookupError)
            reader, writer = multiprocessing.Pipe()
            run(js, identity, 1)
            run(js, count_fds, js, reader, writer)
            with pytest.raises(RuntimeError, match="on purpose"):
                run(js, identity, Bomb("exception", "unpickling", 0), reader)
            reader.close()
            writer.close()
            gc.collect()
            counts.append((len(open_fds()), run(js, count_fds)))
            for number in range(30):
                run(js, identity, number)
        assert counts[1] == counts[2]


@pytest.mark.contract("H13", "W1")
def test_answer_before_the_job_is_tracked(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that two other threads hear of before the submitter has noted the job is kept."""
    with warm(method) as js:
        run(js, nothing)
        reactor, launcher = js._shared.reactor, type(js._shared.launcher)
        hand_over = launcher.hand_over

        def slowly(self: Any, prepared: Any, lease: Any, bell: int, worker: Any) -> bool:
            done = hand_over(self, prepared, lease, bell, worker)
            poller = select.poll()
            poller.register(worker.channel, select.POLLIN)
            events = poller.poll(PATIENCE * 1000)
            for _ in range(2):
                with reactor.lock:
                    reactor._handle(events)
            return done

        monkeypatch.setattr(launcher, "hand_over", slowly)
        assert [run(js, identity, number) for number in range(2)] == [0, 1]


@pytest.mark.contract("N1", "W1")
def test_slot_of_an_early_answer_is_free(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot of an answer that comes before its submission returns is free with the result."""
    with warm(method, 2) as js:
        run(js, identity, 0)
        launcher = js._shared.launcher
        hand_over = launcher.hand_over

        def answered(prepared: Any, lease: Any, bell: int, worker: Any) -> bool:
            done = hand_over(prepared, lease, bell, worker)
            assert select.select([worker.channel], [], [], PATIENCE)[0]
            js.reclaim_resources()
            return done

        monkeypatch.setattr(launcher, "hand_over", answered)
        assert js(identity, 1).result() == 1
        assert js._shared.slots.free() == 2


@pytest.mark.contract("H13", "W1")
def test_threads_submit_at_the_same_time(method: str) -> None:
    """Workers and slots are handed among threads: all jobs run, in no more workers than slots."""
    found: dict[int, int] = {}

    def work(thread: int) -> None:
        for number in range(thread, 40, 4):
            found[number] = run(js, identity, number)

    with warm(method, 2) as js:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert found == {n: n for n in range(40)}
        assert js._shared.slots.free() == 2
        assert len(js._shared.reactor.crew) <= 2
