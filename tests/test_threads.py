# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Many threads on one Jobserver and on its Futures; forks in the middle of it."""

from __future__ import annotations

import functools
import os
import queue
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    free_slots,
    hard_exit,
    identity,
    nothing,
    settle,
    sleep,
    wait_until,
)
from jobs import nest, use_from_threads

from jobserver import Blocked, CallbackRaised, Future, Jobserver, SubmissionDied, _shared

if TYPE_CHECKING:
    from collections.abc import Iterable


def in_threads(functions: Iterable[Callable[[], object]]) -> list[Any]:
    """Run functions side by side, started together; their results or their exceptions."""
    chosen = list(functions)
    outcome: list[Any] = [None] * len(chosen)
    barrier = threading.Barrier(len(chosen))

    def run(number: int, function: Callable[[], object]) -> None:
        try:
            barrier.wait(PATIENCE)
            outcome[number] = function()
        except BaseException as error:
            outcome[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(chosen)]
    before = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    # Nothing here takes long: a wait that ended only at its own deadline has missed its wake-up.
    assert time.monotonic() - before < PATIENCE / 2
    return outcome


def os_threads() -> set[str]:
    """All threads of this process that the system knows, also those Python does not."""
    return set(os.listdir("/proc/self/task"))


@pytest.mark.contract("H14")
def test_no_thread_is_started(method: str, gate: Gate) -> None:
    """Nothing that a Jobserver does starts a thread."""
    before = os_threads()
    with Jobserver(method, 2) as js:
        running = js.submit(gate.enter)
        running.when_done(nothing)
        assert list(js.map(identity, [(1,), (2,)], buffersize=1)) == [1, 2]
        with pytest.raises(Blocked):
            running.result(0.05)
        assert os_threads() <= before  # whose last ones may still end
        gate.open()
        assert running.wait(PATIENCE)
        js.reclaim_resources()
        assert os_threads() <= before  # whose last ones may still end


@pytest.mark.contract("H13", "F23", "F12")
def test_many_threads_on_one_future(method: str, gate: Gate) -> None:
    """Every thread that waits for a Future, by whatever call, is woken by its end."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)
        calls: list[Callable[[], object]] = [future.result, future.wait, lambda: future.done(None)]
        timer = threading.Timer(0.05, gate.open)
        timer.start()
        outcome = in_threads(calls * 5 + [lambda: future.result(PATIENCE)])
        (worker,) = gate.entered()
        assert outcome == [worker, True, True] * 5 + [worker]


@pytest.mark.contract("H13", "F23", "F25")
def test_many_threads_on_many_futures() -> None:
    """Each thread waits for a Future of its own; each gets what it waits for."""
    js = Jobserver("fork", 4)
    futures = [js.submit(identity, args=(n,)) for n in range(32)]

    assert in_threads([future.result for future in futures]) == list(range(32))


@pytest.mark.contract("H13", "F23", "S3")
def test_many_threads_submit_and_wait(method: str, gate: Gate) -> None:
    """Threads that submit and wait at the same time all come through, on few slots."""
    rounds = {"fork": 12, "spawn": 2, "forkserver": 12}[method]

    def work(thread: int) -> list[int]:
        return [
            js.submit(add, args=(thread,), kwargs={"b": n}).result(PATIENCE) for n in range(rounds)
        ]

    with Jobserver(method, 2) as js:
        outcome = in_threads([functools.partial(work, number) for number in range(6)])
        assert outcome == [[number + n for n in range(rounds)] for number in range(6)]
        assert free_slots(js, gate) == 2


@pytest.mark.contract("H13", "S3", "S4")
def test_slots_are_never_exceeded_by_threads(gate: Gate) -> None:
    """However many threads submit, only as many jobs as slots run."""
    js = Jobserver("fork", 3)

    def attempt() -> object:
        try:
            return js.submit(gate.enter, timeout=0)
        except Blocked:
            return None

    outcome = in_threads([attempt] * 10)
    started = [future for future in outcome if isinstance(future, Future)]
    assert len(started) == 3
    gate.open()

    assert len({future.result(PATIENCE) for future in started}) == 3


@pytest.mark.contract("H13", "F23")
def test_no_lost_wake_up_between_submit_and_result() -> None:
    """A thread blocked in submit goes on when another thread is the one that reaps."""
    js = Jobserver("fork", 1)
    handed: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def produce() -> None:
        for number in range(40):
            handed.put(js.submit(identity, args=(number,)))
        handed.put(None)

    def consume() -> list[Any]:
        return [future.result() for future in iter(handed.get, None)]

    assert in_threads([produce, consume])[1] == list(range(40))


@pytest.mark.contract("H13", "F23", "S15")
def test_no_lost_wake_up_among_submitters() -> None:
    """Many threads blocked in submit on one slot all get their turn, without any other help."""
    js = Jobserver("fork", 1)
    outcome = in_threads(
        [functools.partial(js.submit, identity, args=(number,)) for number in range(12)]
    )
    settle(js)

    assert sorted(future.result(0) for future in outcome) == list(range(12))


@pytest.mark.contract("H3", "H13")
def test_no_lost_wake_up_as_the_last_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for workers to be gone goes on when another thread has reaped the last of them."""
    monkeypatch.setattr(_shared, "_LINGER", PATIENCE)
    begun = time.monotonic()
    for _ in range(30):
        js = Jobserver("fork", 1, max_tasks_per_child=None)
        js.__enter__()
        js.submit(nothing).result(PATIENCE)
        closing = threading.Thread(target=js.__exit__, args=(None, None, None))
        closing.start()
        while closing.is_alive() and js._shared.reactor.poller.watched:
            js._shared.reactor.reap()
        closing.join()
    assert time.monotonic() - begun < PATIENCE


@pytest.mark.contract("H13", "F23")
def test_waiter_hears_of_a_job_that_others_submit_meanwhile(gate: Gate) -> None:
    """While one thread blocks on a long job, others submit and collect short ones."""
    js = Jobserver("fork", 2)
    long = js.submit(gate.enter)
    gate.await_entered(1)
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(long.result()))
    thread.start()
    for number in range(10):
        assert js.submit(identity, args=(number,)).result(PATIENCE) == number
    assert outcome == []
    gate.open()
    thread.join(PATIENCE)

    assert outcome == gate.entered()


@pytest.mark.contract("F23", "F4", "F3")
def test_one_thread_signals_what_many_wait_for(method: str, gate: Gate) -> None:
    """A signal from one thread wakes all the others, and each sees the death."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)

        def kill() -> bool:
            return future.wait(PATIENCE, signal=signal.SIGTERM)

        outcome = in_threads([future.result] * 6 + [kill])
        assert [type(each) for each in outcome[:6]] == [SubmissionDied] * 6
        assert outcome[6] is True


@pytest.mark.contract("F13", "F23")
def test_callbacks_run_once_among_many_observers() -> None:
    """However many threads observe the end, each callback runs exactly once."""
    js = Jobserver("fork", 4)

    def one_round() -> list[int]:
        seen: list[int] = []
        future = js.submit(nothing)
        for number in range(5):
            future.when_done(seen.append, number)
        in_threads([future.wait, future.result, js.reclaim_resources, lambda: future.done(None)])
        wait_until(lambda: len(seen) >= 5, "the callbacks")
        return seen

    for _ in range(10):
        assert one_round() == list(range(5))


@pytest.mark.contract("F19", "F20", "F23")
def test_each_callback_error_is_raised_once_among_threads() -> None:
    """An error surfaces in one thread only."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=(1,))
    for _ in range(3):
        future.when_done(int, "no number")
    errors = []

    def observe() -> None:
        while True:
            try:
                assert future.result(PATIENCE) == 1
            except CallbackRaised as raised:
                errors.append(raised.seqno)
            else:
                return

    assert in_threads([observe] * 6) == [None] * 6
    assert sorted(errors) == [0, 1, 2]


@pytest.mark.contract("F13", "F14", "F23")
def test_registering_while_the_job_ends() -> None:
    """A callback registered at the very moment of the end is not lost."""
    js = Jobserver("fork", 2)

    def one_round() -> list[int]:
        seen: list[int] = []
        future = js.submit(nothing)
        in_threads([future.wait, lambda: future.when_done(seen.append, 1)])
        future.wait(PATIENCE)
        wait_until(lambda: seen, "the callback")
        return seen

    for _ in range(20):
        assert one_round() == [1]


@pytest.mark.contract("F16", "F23")
def test_callbacks_of_two_threads_do_not_block_each_other(gate: Gate) -> None:
    """A callback that waits for another thread's callback is served."""
    js = Jobserver("fork", 2)
    first, second = js.submit(gate.enter), js.submit(gate.enter)
    begun, event = threading.Event(), threading.Event()
    waited: list[bool] = []
    first.when_done(begun.set)
    first.when_done(lambda: waited.append(event.wait(PATIENCE)))
    second.when_done(event.set)
    gate.open()
    thread = threading.Thread(target=first.wait)
    thread.start()
    assert begun.wait(PATIENCE)
    assert second.wait(PATIENCE)
    thread.join(PATIENCE)

    assert waited == [True]


@pytest.mark.contract("F23", "F9", "F25")
def test_deaths_among_threads() -> None:
    """Threads whose jobs die and threads whose jobs finish do not disturb each other."""
    js = Jobserver("fork", 3)

    def work(number: int) -> list[Any]:
        got: list[Any] = []
        for n in range(5):
            future = js.submit(hard_exit if number % 2 else identity, args=(n,))
            try:
                got.append(future.result(PATIENCE))
            except SubmissionDied as died:
                got.append(died.exitcode)
        return got

    outcome = in_threads([functools.partial(work, number) for number in range(6)])

    assert outcome == [list(range(5))] * 6


@pytest.mark.contract("H13", "H14")
def test_threads_inside_a_job(method: str) -> None:
    """Threads of a job may submit to the Jobserver that the job runs in."""
    with Jobserver(method, 2) as js:
        assert js.submit(use_from_threads, args=(js, 3)).result(PATIENCE) == [0, 1, 2]


@pytest.mark.contract("H13", "N3")
def test_threads_with_nested_jobs(method: str) -> None:
    """Trees of jobs started by several threads share the slots without a deadlock."""
    with Jobserver(method, 3) as js:
        outcome = in_threads([lambda: js.submit(nest, args=(js, 1)).result(PATIENCE)] * 2)
    assert [len(pids) for pids in outcome] == [2, 2]


@pytest.mark.contract("H13", "J2")
def test_forks_of_the_user_in_the_middle() -> None:
    """A fork by other code, at any moment, leaves parent and child usable."""
    js = Jobserver("fork", 2)
    stop = threading.Event()

    def work() -> int:
        count = 0
        while not stop.is_set():
            assert js.submit(identity, args=(count,)).result(PATIENCE) == count
            count += 1
        return count

    def fork() -> list[int]:
        statuses = []
        for _ in range(10):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    signal.alarm(int(PATIENCE))
                    mine = Jobserver("fork", 1)
                    status = 0 if mine.submit(add, args=(1, 2)).result() == 3 else 2
                    js.reclaim_resources()
                    assert repr(js) == "Jobserver('fork', tracked=0)"
                finally:
                    os._exit(status)
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        return statuses

    first, second, statuses = in_threads([work, work, fork])

    assert statuses == [0] * 10
    assert first > 0
    assert second > 0


@pytest.mark.contract("H7", "F26")
def test_inherited_handle_after_a_fork(gate: Gate) -> None:
    """A forked child may use the handle on the same slots; the parent's Futures stay its own."""
    js = Jobserver("fork", 2)
    running = js.submit(gate.enter)
    gate.await_entered(1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(int(PATIENCE))
            answers = [js.submit(add, args=(1, 2), timeout=0).result(PATIENCE), repr(js)]
            del running
            os.write(writer, repr(answers).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert stream.read() == "[3, \"Jobserver('fork', tracked=0)\"]"
    os.waitpid(child, 0)
    assert not running.done()
    gate.open()

    assert running.result(PATIENCE) in gate.entered()
    assert js.submit(nothing, timeout=0).wait(PATIENCE)


@pytest.mark.contract("H13", "F3")
def test_many_threads_signal_one_job(gate: Gate) -> None:
    """Signals from several threads to a job that ends meanwhile raise nothing."""
    js = Jobserver("fork", 1)

    def kill_all_at_once(future: Future[float]) -> list[Any]:
        return in_threads([lambda: future.wait(PATIENCE, signal=signal.SIGKILL)] * 6)

    for _ in range(5):
        assert kill_all_at_once(js.submit(sleep, args=(30,))) == [True] * 6
    assert free_slots(js, gate) == 1
