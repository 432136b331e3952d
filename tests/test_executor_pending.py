# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Pending calls of an executor: their order, their cancellation, and what is let go with them."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import CancelledError, as_completed, wait
from pathlib import Path

import pytest
from executor_jobs import Recorder, Weighty, await_running, hold, in_threads, note_and_return
from helpers import PATIENCE, Gate, identity, lines, wait_until

from jobserver import Jobserver, JobserverExecutor

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


@pytest.mark.contract("E8")
def test_pending_until_a_slot_is_taken(method: str, gate: Gate) -> None:
    """A call without a slot is neither running nor done, can be cancelled, and then never runs."""
    with JobserverExecutor(1, method) as executor:
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        pending = executor.submit(gate.enter)
        last = executor.submit(identity, 3)

        assert (running.running(), pending.running(), pending.done()) == (True, False, False)
        assert pending.cancel()
        assert pending.cancelled()
        assert not running.cancel()
        with pytest.raises(CancelledError):
            pending.result(PATIENCE)
        gate.open()
        assert running.result(PATIENCE) == gate.entered()[0]
        assert last.result(PATIENCE) == 3
    assert len(gate.entered()) == 1


@pytest.mark.contract("E8")
def test_pending_while_others_hold_the_slots(gate: Gate) -> None:
    """A call is pending also while it is a direct submission that holds the slot."""
    with Jobserver("fork", 1) as js, JobserverExecutor(js) as executor:
        direct = js.submit(gate.enter)
        pending = executor.submit(identity, 1)
        gate.await_entered(1)

        assert not pending.running()
        assert pending.cancel()
        gate.open()
        direct.result(PATIENCE)


@pytest.mark.contract("E5")
def test_first_come_first_served(tmp_path: Path) -> None:
    """Calls start in the order in which they were submitted, less those that were cancelled."""
    log = tmp_path / "log"
    with Jobserver("fork", 1) as js, JobserverExecutor(js) as executor:
        gate = Gate(tmp_path)
        direct = js.submit(gate.enter)
        futures = [executor.submit(note_and_return, str(log), number) for number in range(6)]
        assert futures[0].cancel()
        assert futures[3].cancel()
        gate.open()
        direct.result(PATIENCE)
    assert lines(log) == ["1", "2", "4", "5"]


@pytest.mark.contract("E8", "E5")
@pytest.mark.parametrize("ask", [wait, as_completed])
def test_waiters_hear_of_a_cancellation_at_once(ask: object, gate: Gate) -> None:
    """wait() and as_completed() return for a cancelled call though no slot has become free."""
    with JobserverExecutor(1, "fork") as executor:
        running = executor.submit(gate.enter)
        gate.await_entered(1)
        before, meanwhile = executor.submit(identity, 1), executor.submit(identity, 2)
        assert before.cancel()

        def waiting() -> object:
            if ask is wait:
                return wait([before, meanwhile], PATIENCE).done
            return set(as_completed([before, meanwhile], PATIENCE))

        def cancelling() -> bool:
            wait_until(lambda: meanwhile._waiters, "the other thread to wait")
            return meanwhile.cancel()

        assert in_threads(waiting, cancelling) == [{before, meanwhile}, True]
        assert running.running()
        gate.open()


@pytest.mark.contract("E8")
def test_cancelled_call_lets_go_of_its_arguments(gate: Gate) -> None:
    """The arguments of a cancelled call are freed while other calls still run."""
    with JobserverExecutor(1, "fork") as executor:
        executor.submit(gate.enter)
        gate.await_entered(1)
        thing = Weighty()
        watched = weakref.ref(thing)
        future = executor.submit(identity, thing)
        del thing
        assert watched() is not None
        future.cancel()

        assert watched() is None
        gate.open()


@pytest.mark.contract("E5")
@swift
def test_finished_call_lets_go_of_its_arguments_and_result(method: str) -> None:
    """When a call is done the executor holds neither its arguments nor its result."""
    with JobserverExecutor(2, method) as executor:
        thing = Weighty()
        argument = weakref.ref(thing)
        future = executor.submit(identity, thing)
        del thing
        value = weakref.ref(future.result(PATIENCE))
        wait_until(lambda: argument() is None, "the argument to be let go")

        assert value() is not None
        gc.disable()
        try:
            del future
            wait_until(lambda: value() is None, "the result to be let go")
        finally:
            gc.enable()


@pytest.mark.contract("E5")
@swift
def test_failed_call_is_no_cycle(method: str) -> None:
    """A future that has raised is freed without the garbage collector, as is what it raised."""
    gc.collect()
    gc.disable()
    try:
        with JobserverExecutor(2, method) as executor:
            failed, died = executor.submit(divmod, 1, 0), executor.submit(hold, None, 1)
            with pytest.raises(ZeroDivisionError):
                failed.result(PATIENCE)
            assert died.exception(PATIENCE) is not None
            watched = [weakref.ref(failed), weakref.ref(died)]
            del failed, died

            wait_until(lambda: not any(ref() for ref in watched), "the futures to be let go")
    finally:
        gc.enable()


@pytest.mark.contract("E8")
def test_cancel_twice() -> None:
    """Cancelling again says True and calls no callback a second time."""
    note = Recorder()
    with Jobserver("fork", 1) as js, JobserverExecutor(js.replace(sleep_fn=lambda: 60)) as executor:
        future = executor.submit(identity, 1)
        future.add_done_callback(note)
        assert [future.cancel() for _ in range(3)] == [True] * 3
        assert note.calls == [future]


@pytest.mark.contract("E8")
@swift
def test_cancelling_against_starting(method: str) -> None:
    """Whichever comes first, a call is either cancelled or gives its result."""
    with JobserverExecutor(2, method) as executor:
        for _ in range(5):
            futures = [executor.submit(identity, number) for number in range(12)]
            cancelled = [future.cancel() for future in reversed(futures)]
            for number, (future, was) in enumerate(zip(futures, reversed(cancelled))):
                assert future.cancelled() is was
                if not was:
                    assert future.result(PATIENCE) == number


@pytest.mark.contract("E8")
def test_thousands_of_pending_calls(gate: Gate) -> None:
    """Thousands of calls can be pending, and be cancelled, in little time."""
    with JobserverExecutor(1, "fork") as executor:
        held = executor.submit(gate.enter)
        gate.await_entered(1)
        futures = [executor.submit(identity, number) for number in range(5000)]
        assert all(future.cancel() for future in futures[1:])
        gate.open()
        await_running(held)

        assert futures[0].result(PATIENCE) == 0
