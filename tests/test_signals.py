# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Future.wait(signal=...): cancelling, stopping and talking to running jobs."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_answer,
    free_slots,
    identity,
    process_state,
    wait_until,
)
from jobs import Catcher
from marks import by_method

from jobserver import Jobserver, SubmissionDied


@pytest.mark.contract("F3", "F5", "F9", "F10")
@by_method("signum", [signal.SIGTERM, signal.SIGKILL])
def test_cancel_and_wait(method: str, gate: Gate, signum: signal.Signals) -> None:
    """wait(5, signal=S) ends the job and tells so: SubmissionDied with the signal."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)
        assert future.wait(PATIENCE, signal=signum) is True
        with pytest.raises(SubmissionDied, match=signum.name) as caught:
            future.result(0)
        assert caught.value.exitcode == -signum
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("F3", "F5")
def test_signal_that_the_job_handles(method: str, gate: Gate) -> None:
    """A signal that the job handles does not end it: SIGUSR1 arrives and the result comes."""
    with Jobserver(method, 1) as js:
        future = js.submit(Catcher(gate), args=(signal.SIGUSR1,))
        gate.await_entered(1)
        assert future.wait(0, signal=signal.SIGUSR1) is False
        gate.open()
        assert future.result(PATIENCE) == [signal.SIGUSR1]


@pytest.mark.contract("F3", "F5")
def test_stop_and_continue(method: str, gate: Gate) -> None:
    """SIGSTOP freezes the job, which is not death; SIGCONT lets it go on."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        (worker,) = gate.await_entered(1)
        assert future.wait(0, signal=signal.SIGSTOP) is False
        wait_until(lambda: process_state(worker) == "T", "the job to stop")
        gate.open()
        assert future.wait(0.1) is False
        assert future.wait(PATIENCE, signal=signal.SIGCONT) is True
        assert future.result(0) == worker


@pytest.mark.contract("F3")
def test_signal_to_an_ended_job(method: str) -> None:
    """A signal for a job that has just ended, observed or not, is no error."""
    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=(4,))
        await_answer(future)
        assert future.wait(PATIENCE, signal=signal.SIGKILL) is True
        assert future.wait(0, signal=signal.SIGKILL) is True
        assert future.result(0) == 4


@pytest.mark.contract("F3")
def test_signal_reaches_only_its_job(gate: Gate) -> None:
    """A signal goes to the Future's own job and to no other."""
    js = Jobserver("fork", 2)
    victim, other = js.submit(gate.enter), js.submit(gate.enter)
    gate.await_entered(2)

    assert victim.wait(PATIENCE, signal=signal.SIGKILL)
    assert other.wait(0.05) is False
    gate.open()

    assert other.result(PATIENCE) in gate.entered()


@pytest.mark.contract("F3", "S17")
@pytest.mark.parametrize("number", ["SIGTERM", 1.5, 0.0, -1, 10_000], ids=repr)
def test_malformed_signal(gate: Gate, number: Any) -> None:
    """What is no signal is refused at the call, and the job goes on."""
    js = Jobserver("fork", 1)
    future = js.submit(gate.enter)
    gate.await_entered(1)

    with pytest.raises((TypeError, ValueError, OSError)):
        future.wait(0, signal=number)

    gate.open()
    assert future.result(PATIENCE) in gate.entered()


@pytest.mark.contract("F4", "F23")
def test_signal_while_another_thread_waits(method: str, gate: Gate) -> None:
    """A signal is sent at once although another thread is blocked on the same Future."""
    outcome: list[BaseException] = []

    def blocked() -> None:
        try:
            future.result()
        except SubmissionDied as died:
            outcome.append(died)

    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        gate.await_entered(1)
        thread = threading.Thread(target=blocked)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert future.wait(PATIENCE, signal=signal.SIGKILL) is True
        thread.join(PATIENCE)

    assert [died.exitcode for died in outcome if isinstance(died, SubmissionDied)] == [-9]
