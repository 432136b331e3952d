# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""JobserverExecutor.map, whose semantics are the standard library's of Python 3.14."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from executor_jobs import hold, in_threads, make_weighty, note_and_hold, pid_of
from helpers import PATIENCE, Gate, add, identity, lines, wait_until
from jobs import fail_for, slow_for

from jobserver import JobserverExecutor

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


class Reading:
    """An endless input that counts how much of it has been read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.read += 1
            yield self.read - 1


@pytest.mark.contract("E5")
@pytest.mark.parametrize("chunksize", [1, 3, 50])
def test_results_in_order(method: str, chunksize: int) -> None:
    """Results come in the order of the inputs, whatever ends first and however it is chunked."""
    with JobserverExecutor(2, method) as executor:
        found = executor.map(slow_for, range(5), chunksize=chunksize)
        assert list(found) == list(range(5))
        assert list(executor.map(add, range(5), [1, 1], chunksize=chunksize)) == [1, 2]
        assert list(executor.map(identity, [], chunksize=chunksize)) == []


@pytest.mark.contract("E5")
@swift
def test_chunk_goes_to_one_worker(method: str) -> None:
    """chunksize calls are made by one process."""
    with JobserverExecutor(2, method) as executor:
        pids = list(executor.map(pid_of, range(6), chunksize=3))
        assert len(set(pids[:3])) == len(set(pids[3:])) == 1


@pytest.mark.contract("E5")
def test_malformed_sizes() -> None:
    """Sizes are checked at the call, as the standard library checks them."""
    with JobserverExecutor(1, "fork") as executor:
        for chunksize in (0, -1):
            with pytest.raises(ValueError, match="chunksize must be >= 1"):
                executor.map(identity, [1], chunksize=chunksize)
        for buffersize in (0, -1):
            with pytest.raises(ValueError, match="buffersize must be None or > 0"):
                executor.map(identity, [1], buffersize=buffersize)
        for wrong in ("1", 1.0):
            with pytest.raises(TypeError, match="buffersize must be an integer or None"):
                executor.map(identity, [1], buffersize=wrong)  # type: ignore[arg-type]


@pytest.mark.contract("E5")
@swift
def test_failure_comes_in_its_place(method: str) -> None:
    """Results before the failed call are yielded, then its exception, and no more."""
    with JobserverExecutor(2, method) as executor:
        found = executor.map(fail_for, range(4), [2] * 4)
        assert [next(found), next(found)] == [0, 1]
        with pytest.raises(LookupError):
            next(found)
        with pytest.raises(StopIteration):
            next(found)


@pytest.mark.contract("E5")
def test_timeout_counts_from_the_call(gate: Gate) -> None:
    """Past the timeout the iterator raises TimeoutError, and cancels what is pending."""
    with JobserverExecutor(1, "fork") as executor:
        begun = time.monotonic()
        found = executor.map(hold, [gate] * 3, range(3), timeout=0.2)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(found)
        assert 0.2 <= time.monotonic() - begun < PATIENCE
        wait_until(lambda: "pending=0" in repr(executor), "the pending calls to be cancelled")
        gate.open()
    assert len(gate.entered()) == 1


@pytest.mark.contract("E5")
def test_in_time() -> None:
    """A timeout that is not reached changes nothing."""
    with JobserverExecutor(2, "fork") as executor:
        assert list(executor.map(identity, range(3), timeout=PATIENCE)) == [0, 1, 2]


@pytest.mark.contract("E5")
@swift
@pytest.mark.parametrize("chunksize", [1, 2])
def test_buffersize_reads_lazily(method: str, chunksize: int) -> None:
    """With buffersize no more of an endless input is read than the buffer has room for."""
    reading = Reading()
    with JobserverExecutor(2, method) as executor:
        found = executor.map(identity, reading, buffersize=3, chunksize=chunksize)
        assert reading.read == 3 * chunksize
        for number in range(5):
            assert next(found) == number
            yielded = number // chunksize + 1
            assert reading.read == (3 + yielded) * chunksize
        del found


@pytest.mark.contract("E5")
def test_without_buffersize_all_is_read(gate: Gate) -> None:
    """Without buffersize the inputs are read, and submitted, at the call."""
    numbers = iter(range(10))
    with JobserverExecutor(1, "fork") as executor:
        held = executor.submit(gate.enter)
        found = executor.map(identity, numbers)
        assert next(numbers, "all read") == "all read"
        gate.open()
        assert list(found) == list(range(10))
        assert held.done()


@pytest.mark.contract("E5")
def test_endless_input_with_infinite_others() -> None:
    """The shortest input decides, also when another one never ends."""
    with JobserverExecutor(2, "fork") as executor:
        found = executor.map(add, itertools.count(), range(4), buffersize=2)
        assert list(found) == [0, 2, 4, 6]


@pytest.mark.contract("E5")
def test_leaving_early_cancels_what_is_pending(
    tmp_path: Path, make_gate: Callable[[], Gate]
) -> None:
    """An iterator that is closed, or collected, cancels the calls that have not started."""
    log = tmp_path / "log"
    with JobserverExecutor(1, "fork") as executor:
        for leave in ("close", "drop"):
            gate = make_gate()
            found: Any = executor.map(note_and_hold, [gate] * 50, [str(log)] * 50, range(50))
            assert next(found) == 0
            gate.await_entered(1)
            if leave == "close":
                found.close()
            del found
            gc.collect()
            wait_until(lambda: "pending=0" in repr(executor), "the pending calls to be cancelled")
            gate.open()
    assert lines(log) == ["0", "1"] * 2


@pytest.mark.contract("E5")
def test_yielded_objects_are_let_go() -> None:
    """The iterator keeps no reference to what it has yielded."""
    with JobserverExecutor(2, "fork") as executor:
        for chunksize in (1, 2):
            for thing in executor.map(make_weighty, range(4), chunksize=chunksize):
                watched = weakref.ref(thing)
                del thing
                assert watched() is None


@pytest.mark.contract("E5")
def test_iterator_does_not_hold_the_executor() -> None:
    """A dropped executor finishes what was submitted; with a buffer it submits no more."""
    executor = JobserverExecutor(2, "fork")
    everything = executor.map(identity, range(6))
    lazily = executor.map(identity, itertools.count(), buffersize=3)
    watched = weakref.ref(executor)
    del executor

    assert watched() is None
    assert list(everything) == list(range(6))
    assert list(lazily) == [0, 1, 2]


@pytest.mark.contract("E5")
def test_map_after_shutdown() -> None:
    """map refuses new work after shutdown; a buffered one fails where it would submit."""
    executor = JobserverExecutor(2, "fork")
    begun = executor.map(identity, itertools.count(), buffersize=2)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.map(identity, [1])
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(begun)


@pytest.mark.contract("E5")
def test_failing_input() -> None:
    """What an input raises comes out of map, and the executor goes on."""

    def numbers() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with JobserverExecutor(1, "fork") as executor:
        with pytest.raises(LookupError):
            executor.map(identity, numbers())
        assert list(executor.map(identity, [2])) == [2]


@pytest.mark.contract("E5")
def test_maps_side_by_side() -> None:
    """Several maps on one executor, each in a thread, do not mix."""
    with JobserverExecutor(2, "fork") as executor:

        def work() -> list[int]:
            return list(executor.map(identity, range(8), buffersize=2, chunksize=3))

        assert in_threads(work, work, work) == [list(range(8))] * 3
