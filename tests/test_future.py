# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Future: done, wait, result and what it raises."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import signal
import threading
import time
from typing import Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    chain_text,
    fail,
    hard_exit,
    has_ended,
    identity,
    nothing,
    sleep,
    wait_until,
    worker_pid,
)
from jobs import divide_deeply, fail_from_cause
from marks import by_method

from jobserver import Blocked, Future, Jobserver, SubmissionDied


@pytest.mark.contract("F1", "F6", "F13")
def test_signatures() -> None:
    """done, wait, result and when_done have the parameters and defaults of the contract."""

    def shape(function: Any) -> str:
        signature = inspect.signature(function)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        return str(signature.replace(parameters=bare, return_annotation=signature.empty))

    assert shape(Future.done) == "(self, timeout=0)"
    assert shape(Future.wait) == "(self, timeout=None, *, signal=None)"
    assert shape(Future.result) == "(self, timeout=None)"
    assert shape(Future.when_done) == "(self, fn, /, *args, **kwargs)"


@pytest.mark.contract("F1", "F2")
def test_done_and_wait_before_and_after(method: str, gate: Gate) -> None:
    """done and wait are False while the job runs and True once result(0) does not block."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)
        assert future.done() is False
        assert future.done(timeout=0) is False
        assert future.done(timeout=0.05) is False
        assert future.wait(timeout=0) is False
        assert future.wait(0.05) is False
        gate.open()
        assert future.wait() is True
        assert future.done() is True
        assert future.wait(0) is True
        assert future.done(None) is True
        assert future.result(timeout=0) == gate.entered()[0]


@pytest.mark.contract("F1")
def test_done_none_waits(gate: Gate) -> None:
    """done(None) waits for as long as the job takes."""
    js = Jobserver("fork", 1)
    future = js.submit(gate.enter)
    gate.await_entered(1)
    threading.Timer(0.05, gate.open).start()

    assert future.done(None) is True


@pytest.mark.contract("F1")
@pytest.mark.parametrize("call", ["done", "wait", "result"])
def test_timeouts_are_kept(gate: Gate, call: str) -> None:
    """A wait with a timeout lasts about as long as it says, and never less."""
    js = Jobserver("fork", 1)
    future = js.submit(gate.enter)
    gate.await_entered(1)

    before = time.monotonic()
    if call == "result":
        with pytest.raises(Blocked):
            future.result(0.2)
    else:
        assert getattr(future, call)(0.2) is False
    elapsed = time.monotonic() - before

    assert 0.2 <= elapsed < 5
    gate.open()
    assert future.wait(PATIENCE)


@pytest.mark.contract("F1", "S17")
@pytest.mark.parametrize("call", ["done", "wait", "result"])
@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1", object()], ids=repr)
def test_malformed_timeouts(call: str, timeout: Any) -> None:
    """Malformed timeouts raise TypeError or ValueError, as in submit, done or not."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)

    with pytest.raises((TypeError, ValueError)):
        getattr(future, call)(timeout)
    future.wait(PATIENCE)
    with pytest.raises((TypeError, ValueError)):
        getattr(future, call)(timeout)


@pytest.mark.contract("F1")
def test_done_sees_the_end_by_itself(method: str) -> None:
    """Polling done(0) alone comes to see the job's end."""
    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=(3,))
        wait_until(future.done, "done() to be true")
        assert future.result(0) == 3


@pytest.mark.contract("F6")
@pytest.mark.parametrize("value", [None, 0, False, "", b"", {}, ValueError("a value"), Blocked()])
def test_result_is_the_value(value: Any) -> None:
    """Any value comes back as a value, also falsy ones and exceptions that were returned."""
    js = Jobserver("fork", 1)
    got = js.submit(identity, args=(value,)).result(PATIENCE)

    assert type(got) is type(value)
    assert repr(got) == repr(value)


@pytest.mark.contract("F6", "F12")
def test_result_again_is_the_same(method: str) -> None:
    """result() gives the very same object each time."""
    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=([1, 2],))
        first = future.result(PATIENCE)
        assert first == [1, 2]
        assert future.result() is first
        assert future.result(timeout=0) is first


@pytest.mark.contract("F7", "F12")
@by_method("kind, args", [(KeyError, ("k",)), (ValueError, ("bad",)), (OSError, ("gone",))])
def test_result_raises_what_fn_raised(method: str, kind: type, args: tuple[Any, ...]) -> None:
    """result() raises fn's exception: same type, same arguments, each time."""
    with Jobserver(method, 1) as js:
        future = js.submit(fail, args=(kind, *args))
        raised: list[BaseException] = []
        for _ in range(3):
            with pytest.raises(kind) as caught:
                future.result(PATIENCE)
            assert type(caught.value) is kind
            assert str(caught.value) == str(kind(*args))
            raised.append(caught.value)
        assert all(error is raised[0] for error in raised)
        assert future.done() is True


@pytest.mark.contract("F7")
def test_remote_traceback_is_the_cause(method: str) -> None:
    """The worker's traceback, with its files and lines, is shown as the exception's cause."""
    with Jobserver(method, 1) as js, pytest.raises(ZeroDivisionError) as caught:
        js.submit(divide_deeply, args=(2,)).result(PATIENCE)

    assert caught.value.__cause__ is not None
    cause = str(caught.value.__cause__)
    assert cause.count("in divide_deeply") == 3
    assert "jobs.py" in cause
    assert "ZeroDivisionError: division by zero" in cause
    assert "in divide_deeply" in chain_text(caught.value)


@pytest.mark.contract("F7")
def test_remote_traceback_has_the_remote_cause(method: str) -> None:
    """What caused the exception in the worker is shown, too."""
    with Jobserver(method, 1) as js, pytest.raises(RuntimeError, match="effect") as caught:
        js.submit(fail_from_cause).result(PATIENCE)

    text = chain_text(caught.value)
    assert "LookupError: the cause" in text
    assert "direct cause" in text


@pytest.mark.contract("F7")
@pytest.mark.parametrize("kind", [Blocked, SubmissionDied, GeneratorExit, StopIteration])
def test_exceptions_with_a_meaning_of_their_own(kind: type) -> None:
    """Also exceptions that mean something here come back as what fn raised."""
    js = Jobserver("fork", 1)
    future = js.submit(fail, args=(kind,))

    with pytest.raises(kind) as caught:
        future.result(PATIENCE)
    assert "in fail" in chain_text(caught.value)


@pytest.mark.contract("F8", "F12")
def test_result_blocked(method: str, gate: Gate) -> None:
    """result raises Blocked when the job is not ready in time; later it gives the value."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        for timeout in (0, 0.02):
            with pytest.raises(Blocked):
                future.result(timeout)
        gate.open()
        assert future.result() == gate.entered()[0]


@pytest.mark.contract("F9", "F12", "F2")
def test_submission_died_again_and_again(method: str) -> None:
    """A dead worker is done: wait and done do not raise, result always raises the same."""
    with Jobserver(method, 1) as js:
        future = js.submit(hard_exit, args=(3,))
        assert future.wait(PATIENCE) is True
        assert future.done() is True
        for _ in range(2):
            with pytest.raises(SubmissionDied, match="3") as caught:
                future.result(0)
            assert caught.value.exitcode == 3


@pytest.mark.contract("F10")
def test_submission_died_survives_pickling() -> None:
    """SubmissionDied and its exitcode can travel on, as from a nested job."""
    died = pickle.loads(pickle.dumps(SubmissionDied(-9)))

    assert isinstance(died, SubmissionDied)
    assert died.exitcode == -9
    assert str(died) == str(SubmissionDied(-9))


@pytest.mark.contract("F24")
@pytest.mark.parametrize("operation", [copy.copy, copy.deepcopy, pickle.dumps])
def test_futures_stay_where_they_are(operation: Any) -> None:
    """A Future, running or done, cannot be copied or pickled."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)

    with pytest.raises(TypeError):
        operation(future)
    future.wait(PATIENCE)
    with pytest.raises(TypeError):
        operation(future)
    if operation is not copy.copy:  # which does not look into the list
        with pytest.raises(TypeError):
            operation([future])


@pytest.mark.contract("F25")
def test_death_is_seen_by_its_own_future_only(method: str, gate: Gate) -> None:
    """When one of several workers dies, the others finish as if nothing had happened."""
    with Jobserver(method, 3) as js:
        futures = [js.submit(gate.enter) for _ in range(3)]
        gate.await_entered(3)
        os.kill(worker_pid(futures[1]), signal.SIGKILL)
        assert futures[1].wait(PATIENCE) is True
        assert not futures[0].done()
        assert not futures[2].done()
        gate.open()
        with pytest.raises(SubmissionDied):
            futures[1].result(0)
        assert futures[0].result(PATIENCE) != futures[2].result(PATIENCE)
        assert js.submit(add, args=(1, 2)).result(PATIENCE) == 3


@pytest.mark.contract("F26", "S3")
def test_dropped_future_gives_its_slot_back(method: str, gate: Gate) -> None:
    """Without any reference to its Future a job runs to its end, and its slot comes back."""
    with Jobserver(method, 1) as js:
        js.submit(gate.enter)
        (worker,) = gate.await_entered(1)
        assert not has_ended(worker)
        gate.open()
        for number in range(3):
            js.submit(identity, args=(number,), timeout=PATIENCE)
        assert js.submit(identity, args=(3,), timeout=PATIENCE).result(PATIENCE) == 3


@pytest.mark.contract("F26", "F13")
def test_dropped_future_keeps_its_callbacks() -> None:
    """The callbacks of a Future that nobody holds are issued all the same."""
    js = Jobserver("fork", 1)
    seen: list[str] = []
    js.submit(nothing).when_done(seen.append, "called")

    js.submit(nothing, timeout=PATIENCE).result(PATIENCE)

    assert seen == ["called"]


@pytest.mark.contract("F1", "H13")
def test_futures_may_be_waited_for_in_any_order(method: str) -> None:
    """The order of waiting is free: a late job may be asked for first."""
    with Jobserver(method, 3) as js:
        futures = [js.submit(sleep, args=(delay,)) for delay in (0.1, 0.05, 0.0)]
        assert [future.result(PATIENCE) for future in reversed(futures)] == [0.0, 0.05, 0.1]
