# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver.map: timeouts, leaving early, and calls that fail."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from typing import Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_answer,
    await_end,
    fail,
    free_slots,
    has_ended,
    identity,
    nothing,
    settle,
)
from jobs import enter_if, exit_for, fail_for
from marks import by_method

from jobserver import Blocked, CallbackRaised, Jobserver, SubmissionDied


@pytest.mark.contract("M10")
@by_method("buffersize", [None, 1])
def test_timeout(method: str, gate: Gate, buffersize: int | None) -> None:
    """Past the timeout the iterator raises TimeoutError of concurrent.futures."""
    with Jobserver(method, 1) as js:
        before = time.monotonic()
        results = js.map(gate.enter, [()] * 2, timeout=0.3, buffersize=buffersize)
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        assert 0.3 <= time.monotonic() - before < 10
        gate.open()
        assert js.submit(nothing, timeout=PATIENCE).wait(PATIENCE)


@pytest.mark.contract("M10")
def test_timeout_counts_from_the_call(gate: Gate) -> None:
    """The clock starts when map is called, not when the iteration starts or goes on."""
    js = Jobserver("fork", 2)
    results = js.map(enter_if, [(gate, False), (gate, True)], timeout=0.4)
    assert next(results) is False
    time.sleep(0.4)

    before = time.monotonic()
    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    assert time.monotonic() - before < 0.3
    gate.open()
    settle(js)


@pytest.mark.contract("M10", "S10")
def test_timeout_while_sleep_fn_sleeps(gate: Gate) -> None:
    """The timeout ends also what sleep_fn holds up, be it for ever."""
    js = Jobserver("fork", 1)
    results = js.map(identity, [(1,), (2,)], sleep_fn=lambda: 3600, timeout=0.1)

    with pytest.raises(concurrent.futures.TimeoutError):
        next(results)
    assert free_slots(js, gate) == 1


@pytest.mark.contract("M10", "S17")
@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1"], ids=repr)
def test_malformed_timeout(timeout: Any) -> None:
    """A malformed timeout is refused at the call."""
    js = Jobserver("fork", 1)
    with pytest.raises((TypeError, ValueError)):
        js.map(identity, [(1,)], timeout=timeout)


@pytest.mark.contract("M10")
def test_results_in_time() -> None:
    """A timeout that is long enough changes nothing."""
    js = Jobserver("fork", 2)
    assert list(js.map(identity, [(1,), (2,)], timeout=PATIENCE)) == [1, 2]


@pytest.mark.fresh("waits for a worker to end")
@pytest.mark.contract("M11", "M12", "H2")
@by_method("how", ["drop", "break"])
def test_leaving_early(method: str, gate: Gate, make_gate: Callable[[], Gate], how: str) -> None:
    """Leaving neither cancels what has started nor waits for it; its slot comes back."""
    first = make_gate()

    def open_first() -> None:
        first.await_entered(1)
        gate.await_entered(1)
        first.open()

    thread = threading.Thread(target=open_first)
    thread.start()
    with Jobserver(method, 2) as js:
        results = js.map(Gate.enter, [(first,), (gate,)])
        if how == "drop":
            next(results)
        else:
            for _ in results:
                break
        del results
        (worker,) = gate.entered()
        assert not has_ended(worker)
        other = js.submit(gate.enter, timeout=0)
        with pytest.raises(Blocked):
            js.submit(nothing, timeout=0)
        gate.open()
        assert other.wait(PATIENCE)
        await_end(worker)
        js.reclaim_resources()
        assert free_slots(js, make_gate()) == 2
    thread.join(PATIENCE)


@pytest.mark.contract("M11", "M12", "S18")
def test_iterator_never_used(gate: Gate) -> None:
    """A map whose iterator is dropped at once costs no slot."""
    js = Jobserver("fork", 2)

    js.map(identity, [(n,) for n in range(5)])

    settle(js)
    assert free_slots(js, gate) == 2


@pytest.mark.contract("M2", "F7")
def test_exception_comes_in_its_turn(method: str) -> None:
    """A failed call raises at its place in the order, after the results before it."""
    with Jobserver(method, 2) as js:
        results = js.map(fail_for, [(n, 2) for n in range(4)])
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(LookupError, match="2"):
            next(results)
        del results
        settle(js)


@pytest.mark.contract("F19", "F20", "M2", "M18")
@pytest.mark.parametrize("buffersize", [None, 1])
@pytest.mark.parametrize(
    ("chunksize", "tasks", "count"), [(1, 1, 4), ("auto", 1, 4), ("auto", None, 4), (1, None, 60)]
)
def test_callback_that_fails_amid_the_iteration(
    gate: Gate, chunksize: Any, tasks: int | None, count: int, buffersize: int | None
) -> None:
    """A callback's error comes out of the iterator, which goes on with the next call."""
    js = Jobserver("fork", 2, max_tasks_per_child=tasks)
    futures = [js.submit(gate.enter) for _ in range(2)]
    for future, name in zip(futures, ("one", "two")):
        future.when_done(fail, LookupError, name)
    gate.await_entered(2)
    gate.open()
    for future in futures:
        await_answer(future)
    numbers = range(count)
    results = js.map(identity, [(n,) for n in numbers], chunksize=chunksize, buffersize=buffersize)
    found: list[int] = []
    errors: list[str] = []
    while len(found) < len(numbers):
        try:
            found.append(next(results))
        except CallbackRaised as error:
            errors.append(str(error.__cause__))

    assert found == list(numbers)
    assert sorted(errors) == ["one", "two"]
    assert list(results) == []


@pytest.mark.contract("F7", "M10")
def test_blocked_in_a_call(method: str) -> None:
    """A call that raises Blocked is no timeout of the map."""
    with Jobserver(method, 1) as js:
        with pytest.raises(Blocked, match="of its own"):
            list(js.map(fail, [(Blocked, "of its own")], timeout=PATIENCE))
        with pytest.raises(Blocked, match="of its own"):
            list(js.map(fail, [(Blocked, "of its own")]))


@pytest.mark.contract("M2", "M8", "F7")
def test_exception_in_a_chunk() -> None:
    """A failure in a later chunk leaves the results of the earlier ones."""
    js = Jobserver("fork", 1)
    results = js.map(fail_for, [(n, 3) for n in range(6)], chunksize=2)

    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="3"):
        list(results)
    settle(js)


@pytest.mark.contract("M2", "F9")
def test_death_comes_in_its_turn(gate: Gate) -> None:
    """A worker's death is a SubmissionDied at its place in the order."""
    js = Jobserver("fork", 2)
    results = js.map(exit_for, [(n, 1) for n in range(3)])
    assert next(results) == 0
    with pytest.raises(SubmissionDied):
        next(results)
    del results
    js.submit(nothing).wait(PATIENCE)

    assert free_slots(js, gate) == 2
