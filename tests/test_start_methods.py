# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""multiprocessing's own objects as arguments, under every start method and by context object."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import pytest
from helpers import PATIENCE, Gate, add, descendants, has_ended, identity, pid, wait_until
from jobs import other_methods
from jobs_shared import (
    count_up,
    echo,
    fill,
    hand_on,
    meet,
    notify,
    pass_event,
    put,
    send,
    tracker_pipe,
    write_block,
    write_fd,
    write_shared,
)
from marks import by_method

from jobserver import Jobserver


@pytest.fixture
def context(method: str) -> Any:
    """A multiprocessing context for each start method."""
    return multiprocessing.get_context(method)


@pytest.mark.contract("J2", "S2")
def test_queue(context: Any) -> None:
    """A Queue carries values from a job to the caller."""
    queue = context.Queue()
    try:
        with Jobserver(context, 1) as js:
            # More than the pipe below takes, so read first: a worker flushes its queues as it ends.
            future = js.submit(put, args=(queue, "x" * 100_000))
            assert queue.get(timeout=PATIENCE) == "x" * 100_000
            assert future.result(PATIENCE) is None
    finally:
        queue.close()
        queue.join_thread()


@pytest.mark.contract("J2", "S2")
def test_simple_queue(context: Any) -> None:
    """A SimpleQueue carries values from a job to the caller."""
    queue = context.SimpleQueue()
    try:
        with Jobserver(context, 1) as js:
            js.submit(put, kwargs={"queue": queue, "value": [1, None]}).result(PATIENCE)
        assert queue.get() == [1, None]
    finally:
        queue._reader.close()
        queue._writer.close()


@pytest.mark.contract("J2", "S2")
@by_method("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore"])
def test_locks(context: Any, kind: str) -> None:
    """Locks and shared values exclude jobs from each other."""
    lock, value = getattr(context, kind)(), context.Value("i", 0, lock=False)
    with Jobserver(context, 2) as js:
        for future in [js.submit(count_up, args=(lock, value, 50)) for _ in range(2)]:
            future.result(PATIENCE)

    assert value.value == 100


@pytest.mark.contract("J2", "S2")
def test_events(context: Any) -> None:
    """Events work in both directions."""
    event, answer = context.Event(), context.Event()
    with Jobserver(context, 1) as js:
        future = js.submit(pass_event, args=(event, answer))
        assert not answer.is_set()
        event.set()
        assert answer.wait(PATIENCE)
        assert future.result(PATIENCE) is True


@pytest.mark.contract("J2", "S2")
def test_barrier(context: Any) -> None:
    """A Barrier brings two jobs together."""
    barrier = context.Barrier(2)
    with Jobserver(context, 2) as js:
        futures = [js.submit(meet, args=(barrier,)) for _ in range(2)]
        assert sorted(future.result(PATIENCE) for future in futures) == [0, 1]


@pytest.mark.contract("J2", "S2")
def test_condition(context: Any) -> None:
    """A job notifies the caller through a Condition."""
    condition, flag = context.Condition(), context.Value("i", 0, lock=False)
    with Jobserver(context, 1) as js:
        with condition:
            future = js.submit(notify, args=(condition, flag))
            assert condition.wait_for(lambda: flag.value, PATIENCE)
        future.result(PATIENCE)


@pytest.mark.contract("J2", "S2")
def test_connections(context: Any) -> None:
    """Both ends of a pipe travel, bare or deep inside a structure."""
    ours, theirs = context.Pipe()
    with Jobserver(context, 1) as js, ours, theirs:
        future = js.submit(echo, args=(theirs,))
        ours.send("hello")
        assert future.result(PATIENCE) == "hello"
        assert ours.recv() == "hello"
        js.submit(write_fd, args=({"deep": [theirs]},)).result(PATIENCE)
        assert ours.recv() == "deep"


@pytest.mark.contract("S2", "S18")
def test_job_holds_the_only_other_end(context: Any) -> None:
    """Closing the caller's copy leaves the job's end alone; its end gives EOF here."""
    reader, writer = context.Pipe(duplex=False)
    with Jobserver(context, 2) as js, reader:
        future = js.submit(send, args=(writer, "only"))
        writer.close()
        assert reader.recv() == "only"
        future.result(PATIENCE)
        with pytest.raises(EOFError):
            reader.recv()


@pytest.mark.contract("J2", "S2")
def test_shared_values(context: Any) -> None:
    """Value and Array with their own locks are shared."""
    value, array = context.Value("i", 5), context.Array("d", [1.0, 2.0])
    with Jobserver(context, 1) as js:
        js.submit(count_up, args=(value.get_lock(), value, 3)).result(PATIENCE)
        assert js.submit(list, args=(array,)).result(PATIENCE) == [1.0, 2.0]

    assert value.value == 8


@pytest.mark.contract("J2", "S2")
def test_shared_memory(context: Any) -> None:
    """Shared memory blocks work by name and as arguments, and outlive the job."""
    block: Any = shared_memory.SharedMemory(create=True, size=64)
    try:
        with Jobserver(context, 1) as js:
            assert js.submit(write_shared, args=(block.name, b"name")).result(PATIENCE) == 4
            assert bytes(block.buf[:4]) == b"name"
            js.submit(write_block, args=(block, b"arg")).result(PATIENCE)
            assert bytes(block.buf[:3]) == b"arg"
    finally:
        block.close()
        block.unlink()


@pytest.mark.contract("J2", "S2")
def test_resource_tracker_is_the_callers(context: Any) -> None:
    """A job and its caller have one resource tracker: a job's own would unlink what it attaches."""
    resource_tracker.ensure_running()
    with Jobserver(context, 1) as js:
        assert js.submit(tracker_pipe).result(PATIENCE) == tracker_pipe()


@pytest.mark.contract("J2", "S2")
def test_manager_proxies(context: Any) -> None:
    """A manager's proxies reach the manager from a job."""
    # Forked, since multiprocessing's own forkserver would outlive the test.
    server = multiprocessing.get_context("fork").Manager()
    with server as manager, Jobserver(context, 1) as js:
        proxy = manager.list([1])
        js.submit(fill, args=(proxy, 2)).result(PATIENCE)
        assert list(proxy) == [1, 2]


@pytest.mark.contract("J2", "S2")
def test_objects_travel_to_nested_jobs(context: Any) -> None:
    """Jobs hand multiprocessing objects on to jobs of their own."""
    ours, theirs = context.Pipe()
    with Jobserver(context, 2) as js, ours, theirs:
        js.submit(hand_on, args=(js, theirs)).result(PATIENCE)
        assert ours.recv() == "from below"


@pytest.mark.contract("J2")
def test_methods_side_by_side(gate: Gate) -> None:
    """Jobservers of all start methods run at the same time in one program."""
    pools = [Jobserver(name, 1) for name in ("fork", "spawn", "forkserver")]
    futures = [js.submit(gate.enter) for js in pools]
    pids = gate.await_entered(3)
    gate.open()

    assert sorted(future.result(PATIENCE) for future in futures) == pids


@pytest.mark.contract("J2", "H6")
def test_methods_mixed_in_nesting(method: str) -> None:
    """A job of any start method may use a Jobserver of its own with any other."""
    with Jobserver(method, 1) as js:
        assert js.submit(other_methods).result(PATIENCE) == [3, 3, 3]


@pytest.mark.contract("S2", "H6")
def test_forkserver_starts_one_server() -> None:
    """Jobs under forkserver come from one process, which is not the caller."""
    with Jobserver("forkserver", 2) as js:
        parents = {js.submit(os.getppid).result(PATIENCE) for _ in range(3)}

    assert len(parents) == 1
    assert os.getpid() not in parents
    assert parents <= set(descendants())


@pytest.mark.fresh("workers end with their jobs")
@pytest.mark.contract("S2")
def test_workers_are_gone(method: str) -> None:
    """A worker's process ends with its job."""
    with Jobserver(method, 1) as js:
        worker = js.submit(pid).result(PATIENCE)
        wait_until(lambda: has_ended(worker), "the worker to end")
        assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
        js.reclaim_resources()
        wait_until(lambda: worker not in descendants(), "the reaping")
        assert js.submit(add, args=(1, 1)).result(PATIENCE) == 2
