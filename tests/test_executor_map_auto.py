# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""JobserverExecutor.map(chunksize="auto"): as with single calls, in fewer submissions."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import random
import signal
import threading
import weakref
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Callable

import pytest
from executor_jobs import (
    fail_to_initialize,
    hold,
    in_threads,
    make_weighty,
    note_and_return,
    pid_of,
)
from helpers import PATIENCE, Gate, add, identity, lines, wait_until
from jobs import fail_for
from map_jobs import end_for, meet, odd_result, through

from jobserver import Jobserver, JobserverExecutor
from jobserver._pace import Pace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


@pytest.fixture
def batches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let batches have a number of calls that the test chooses."""

    def choose(size: int) -> None:
        monkeypatch.setattr(Pace, "next", lambda self, left, slots: size)

    return choose


@pytest.mark.contract("M13", "E5")
@pytest.mark.parametrize("buffersize", [None, 3, 100])
def test_results_in_order(method: str, buffersize: int | None) -> None:
    """Results come in the order of the inputs, whatever the batches and buffers."""
    options: Any = {"chunksize": "auto", "buffersize": buffersize}
    with JobserverExecutor(2, method) as executor:
        count = 6 if method == "spawn" else 40
        assert list(executor.map(identity, range(count), **options)) == list(range(count))
        assert list(executor.map(add, range(5), [1, 1], **options)) == [1, 2]
        assert list(executor.map(identity, [], **options)) == []


@pytest.mark.contract("M13")
@swift
def test_cheap_calls_share_submissions(method: str) -> None:
    """Of many cheap calls far fewer submissions are made."""
    executor = JobserverExecutor(Jobserver(method, 2))
    pids = list(executor.map(pid_of, range(800), chunksize="auto"))
    executor.shutdown()
    assert len(set(pids)) < 250


@pytest.mark.contract("M14", "E5")
@swift
def test_failure_comes_in_its_place(method: str, batches_of: Callable[[int], None]) -> None:
    """Results before the failed call are yielded, then its exception, and no more."""
    batches_of(10)
    with JobserverExecutor(2, method) as executor:
        found = executor.map(fail_for, range(20), [12] * 20, chunksize="auto")
        assert [next(found) for _ in range(12)] == list(range(12))
        with pytest.raises(LookupError, match="12"):
            next(found)
        with pytest.raises(StopIteration):
            next(found)


@pytest.mark.contract("M14", "E5")
def test_what_cannot_be_pickled(batches_of: Callable[[int], None]) -> None:
    """A result that cannot be pickled raises what the standard library raises, for its call."""
    batches_of(10)
    with JobserverExecutor(2, "fork") as executor:
        found = executor.map(odd_result, range(10), [5] * 10, chunksize="auto")
        assert [next(found) for _ in range(5)] == list(range(5))
        with pytest.raises(TypeError, match="pickle"):
            next(found)


@pytest.mark.contract("M14", "M15", "E6")
@pytest.mark.parametrize("how", ["kill", "_exit", "exit"])
@swift
def test_death_fails_one_call(
    method: str, how: str, batches_of: Callable[[int], None], tmp_path: Path
) -> None:
    """When a worker dies in a batch, every other call is made, once, without anybody iterating."""
    batches_of(10)
    log = str(tmp_path / "log")
    with JobserverExecutor(2, method) as executor:
        arguments: Any = [[log] * 40, range(40), [13] * 40, [how] * 40]
        results = executor.map(end_for, *arguments, chunksize="auto")
    assert Counter(map(int, lines(tmp_path / "log"))) == Counter(range(40))
    found: list[int] = []
    with pytest.raises(BrokenProcessPool):
        found.extend(results)
    assert found == list(range(13))


@pytest.mark.contract("M14", "M15", "E6")
@pytest.mark.parametrize("seed", range(2))
@swift
def test_workers_killed_at_any_instant(method: str, seed: int, tmp_path: Path) -> None:
    """However many workers are killed, and whenever: no call begins twice, none is forgotten."""
    chance = random.Random(seed)
    count = 100
    log = tmp_path / "log"
    stop = threading.Event()

    def kill() -> None:
        while not stop.wait(chance.uniform(0.001, 0.02)):
            for job in list(executor._engine._runs.jobs):
                if chance.random() < 0.5:
                    job._send(signal.SIGKILL)

    with JobserverExecutor(3, method) as executor:
        thread = threading.Thread(target=kill)
        thread.start()
        results = executor.map(note_and_return, [str(log)] * count, range(count), chunksize="auto")
        wait_until(lambda: "pending=0, running=0" in repr(executor), "all calls to be over")
        stop.set()
        thread.join()
        begun = Counter(map(int, lines(log)))
        assert begun.keys() <= set(range(count))
        assert not begun or max(begun.values()) == 1
        found: list[int] = []
        try:
            found.extend(results)
        except BrokenProcessPool:
            assert len(found) < count
        else:
            assert len(found) == count
        assert found == list(range(len(found)))
        # What was not killed has been made: those that have not begun were killed as they were.
        assert set(found) <= begun.keys()


@pytest.mark.contract("M13", "E5")
def test_results_do_not_wait_for_the_batch(batches_of: Callable[[int], None], gate: Gate) -> None:
    """Results are yielded though a later call of the same batch goes on and on."""
    batches_of(8)
    with JobserverExecutor(1, "fork") as executor:
        results = executor.map(through, [gate] * 8, range(8), [5] * 8, chunksize="auto")
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert not gate.is_open()
        gate.open()
        assert list(results) == [5, 6, 7]


@pytest.mark.contract("M13", "M15")
@swift
def test_idle_slots_take_calls_over(
    method: str, batches_of: Callable[[int], None], tmp_path: Path
) -> None:
    """A slot that would idle takes over calls of a batch that is held up by one of its own."""
    batches_of(12)
    with JobserverExecutor(2, method) as executor:
        arguments: Any = [[str(tmp_path)] * 12, range(12), [0] * 12, [11] * 12]
        assert list(executor.map(meet, *arguments, chunksize="auto")) == list(range(12))


@pytest.mark.contract("M16", "E5")
def test_buffersize_counts_calls() -> None:
    """With a buffer no more inputs are read than it has room for, by who iterates."""
    read: list[int] = []
    threads = set()

    def source() -> Iterator[int]:
        for number in itertools.count():
            read.append(number)
            threads.add(threading.current_thread())
            yield number

    with JobserverExecutor(2, "fork") as executor:
        results = executor.map(identity, source(), chunksize="auto", buffersize=20)
        for number in range(200):
            assert next(results) == number
            assert len(read) <= number + 1 + 20
        del results
    assert threads == {threading.current_thread()}


@pytest.mark.contract("M13", "E5")
def test_timeout_counts_from_the_call(gate: Gate) -> None:
    """Past the timeout the iterator raises TimeoutError, and cancels what is pending."""
    with JobserverExecutor(1, "fork") as executor:
        found = executor.map(hold, [gate] * 9, range(9), timeout=0.2, chunksize="auto")
        with pytest.raises(concurrent.futures.TimeoutError):
            next(found)
        wait_until(lambda: "pending=0" in repr(executor), "the pending calls to be cancelled")
        gate.open()
    assert len(gate.entered()) == 1


@pytest.mark.contract("M13", "E5")
@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_early(
    leave: str, batches_of: Callable[[int], None], tmp_path: Path, gate: Gate
) -> None:
    """An iterator that is closed, or collected, cancels the calls that have not begun."""
    batches_of(50)
    log = tmp_path / "log"
    with JobserverExecutor(1, "fork") as executor:
        found: Any = executor.map(
            noted_through, [gate] * 200, [str(log)] * 200, range(200), chunksize="auto"
        )
        assert next(found) == 0
        if leave == "close":
            found.close()
        del found
        gc.collect()
        wait_until(lambda: "pending=0" in repr(executor), "the pending calls to be cancelled")
        gate.open()
    assert 4 <= len(lines(log)) < 50


def noted_through(gate: Gate, log: str, number: int) -> int:
    """Note the call; the fifth waits for the gate."""
    return through(gate, note_and_return(log, number), 4)


@pytest.mark.contract("M13", "E5")
@pytest.mark.parametrize("wait", [True, False])
def test_shutdown_finishes(wait: bool, tmp_path: Path) -> None:
    """What was submitted before shutdown is finished, though batches are cut after it."""
    log = tmp_path / "log"
    executor = JobserverExecutor(2, "fork")
    found = executor.map(note_and_return, [str(log)] * 300, range(300), chunksize="auto")
    executor.shutdown(wait=wait)
    if wait:
        assert len(lines(log)) == 300
    assert list(found) == list(range(300))
    executor.shutdown()


@pytest.mark.contract("M13", "E5")
def test_shutdown_cancels(batches_of: Callable[[int], None], tmp_path: Path, gate: Gate) -> None:
    """With cancel_futures what has not started is cancelled, and the iterator says so."""
    batches_of(5)
    log = tmp_path / "log"
    executor = JobserverExecutor(1, "fork")
    found: Any = executor.map(
        noted_through, [gate] * 200, [str(log)] * 200, range(200), chunksize="auto"
    )
    assert next(found) == 0
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    results = [0]
    with pytest.raises(concurrent.futures.CancelledError):
        results.extend(found)
    executor.shutdown()
    assert results == list(range(len(results)))
    assert 5 <= len(results) < 50
    assert len(lines(log)) == len(results)


@pytest.mark.contract("M13", "E5")
def test_map_after_shutdown() -> None:
    """map refuses new work after shutdown; a buffered one fails where it would submit."""
    executor = JobserverExecutor(2, "fork")
    begun = executor.map(identity, itertools.count(), buffersize=2, chunksize="auto")
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(identity, [1], chunksize="auto")
    with pytest.raises(RuntimeError, match="after shutdown"):
        list(begun)


@pytest.mark.contract("M13", "E5")
def test_iterator_does_not_hold_the_executor() -> None:
    """A dropped executor finishes what was submitted; with a buffer it reads no more."""
    executor = JobserverExecutor(2, "fork")
    everything = executor.map(identity, range(60), chunksize="auto")
    lazily = executor.map(identity, itertools.count(), buffersize=3, chunksize="auto")
    watched = weakref.ref(executor)
    del executor

    assert watched() is None
    assert list(everything) == list(range(60))
    assert list(lazily) == [0, 1, 2]


@pytest.mark.contract("M13", "E5")
def test_yielded_objects_are_let_go(batches_of: Callable[[int], None]) -> None:
    """The iterator keeps no reference to what it has yielded."""
    with JobserverExecutor(2, "fork") as executor:
        for size in (1, 2):
            batches_of(size)
            for thing in executor.map(make_weighty, range(4), chunksize="auto"):
                watched = weakref.ref(thing)
                del thing
                assert watched() is None


@pytest.mark.contract("M13", "E7")
def test_failing_initializer(tmp_path: Path) -> None:
    """A failing initializer breaks the executor, and the map with it."""
    with JobserverExecutor(
        1, "fork", initializer=fail_to_initialize, initargs=(str(tmp_path / "log"),)
    ) as executor:
        found = executor.map(identity, range(30), chunksize="auto")
        with pytest.raises(BrokenProcessPool, match="initializer"):
            list(found)


@pytest.mark.contract("M13", "E5")
def test_workers_killed_by_the_user(gate: Gate) -> None:
    """kill_workers ends the map: what had not begun is cancelled."""
    executor = JobserverExecutor(2, "fork")
    found = executor.map(hold, [gate] * 20, range(20), chunksize="auto")
    gate.await_entered(2)
    executor.kill_workers()
    with pytest.raises((BrokenProcessPool, concurrent.futures.CancelledError)):
        list(found)
    executor.shutdown()


@pytest.mark.contract("M13", "E5")
def test_maps_side_by_side() -> None:
    """Several maps on one executor, each in a thread, do not mix."""
    with JobserverExecutor(2, "fork") as executor:

        def work() -> list[int]:
            return list(executor.map(identity, range(80), buffersize=20, chunksize="auto"))

        assert in_threads(work, work, work) == [list(range(80))] * 3


@pytest.mark.contract("M13", "N3", "N6")
@pytest.mark.parametrize("lend", [False, True])
@swift
def test_inside_a_job(method: str, lend: bool) -> None:
    """A job may map by an executor over the pool that it runs in, with one slot too."""
    with Jobserver(method, 1, lend=lend) as js:
        assert js.submit(map_by_executor, args=(js, 40)).result(PATIENCE) == list(range(40))


def map_by_executor(js: Jobserver, count: int) -> list[int]:
    """A map inside a job."""
    with JobserverExecutor(js) as executor:
        return list(executor.map(abs, [-n for n in range(count)], chunksize="auto"))
