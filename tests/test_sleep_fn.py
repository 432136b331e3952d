# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""sleep_fn: gating submissions in the submitting process."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    fail,
    free_slots,
    identity,
    nothing,
    touch,
)

from jobserver import Blocked, Jobserver

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.contract("S10")
def test_sleep_fn(tmp_path: Path) -> None:
    """sleep_fn is called here; each number is slept, then it is asked again, until None."""
    js = Jobserver("fork", 1)
    answers = iter([0.05, 0, 0.1, None])
    asked: list[int] = []

    def sleep_fn() -> Any:
        asked.append(os.getpid())
        return next(answers)

    before = time.monotonic()
    future = js.submit(identity, args=(1,), sleep_fn=sleep_fn)
    elapsed = time.monotonic() - before

    assert future.result(PATIENCE) == 1
    assert asked == [os.getpid()] * 4
    assert 0.15 <= elapsed < 5


@pytest.mark.contract("S10")
def test_sleep_fn_is_asked_before_a_slot_is_taken(method: str) -> None:
    """While sleep_fn decides, the only slot is free for others."""
    with Jobserver(method, 1) as js:
        inside: list[int] = []

        def sleep_fn() -> None:
            inside.append(js.submit(identity, args=(5,), timeout=0).result(PATIENCE))

        assert js.submit(identity, args=(6,), sleep_fn=sleep_fn).result(PATIENCE) == 6
    assert inside == [5]


@pytest.mark.contract("S11", "S4")
@pytest.mark.parametrize("seconds", [3600, 1e300, math.inf, 10**400])
@pytest.mark.parametrize("consume", [0, 1])
def test_sleep_fn_cannot_outlast_the_timeout(seconds: float, consume: int, tmp_path: Path) -> None:
    """Asking for more sleep than the timeout leaves gives Blocked at the timeout."""
    js = Jobserver("fork", 1)
    before = time.monotonic()

    with pytest.raises(Blocked):
        js.submit(
            touch,
            args=(str(tmp_path / "ran"),),
            sleep_fn=lambda: seconds,
            timeout=0.2,
            consume=consume,
        )

    assert 0.15 <= time.monotonic() - before < 3
    js.submit(nothing).wait(PATIENCE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.contract("S10", "S11")
def test_sleep_fn_that_always_says_zero() -> None:
    """Zero for ever ends at the timeout, too."""
    js = Jobserver("fork", 1)

    with pytest.raises(Blocked):
        js.submit(nothing, sleep_fn=lambda: 0, timeout=0.1)
    with pytest.raises(Blocked):
        js.submit(nothing, sleep_fn=lambda: 1, timeout=0)
    assert js.submit(identity, args=(1,), sleep_fn=lambda: None, timeout=0).result(PATIENCE) == 1


@pytest.mark.contract("S12", "S18")
@pytest.mark.parametrize(
    "answer",
    [-1, -1e-9, math.nan, -math.inf, "1", b"1", bytearray(b"1"), [], object(), 1j],
    ids=repr,
)
def test_bad_answers_of_sleep_fn(gate: Gate, answer: Any) -> None:
    """Any other answer is a ValueError, and no slot is lost."""
    js = Jobserver("fork", 1)

    with pytest.raises(ValueError):
        js.submit(nothing, sleep_fn=lambda: answer, timeout=1)
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S10", "S18")
def test_sleep_fn_that_raises(gate: Gate) -> None:
    """An exception of sleep_fn passes through submit; nothing has started, no slot is lost."""
    js = Jobserver("fork", 1)

    with pytest.raises(LookupError, match="no idea"):
        js.submit(nothing, sleep_fn=lambda: fail(LookupError, "no idea"))
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S13")
def test_sleep_fn_gates_work_without_a_slot() -> None:
    """consume=0 work is gated by sleep_fn as well."""
    js = Jobserver("fork", 1)
    answers = iter([0.05, None])

    before = time.monotonic()
    assert js.submit(add, args=(1,), consume=0, sleep_fn=lambda: next(answers)).result(PATIENCE)
    assert time.monotonic() - before >= 0.05


@pytest.mark.contract("S10", "S15")
def test_jobs_are_reaped_while_sleep_fn_sleeps(gate: Gate) -> None:
    """Sleeping is waiting: what ends meanwhile is reaped and its callbacks are issued."""
    js = Jobserver("fork", 1)
    seen: list[str] = []
    js.submit(nothing).when_done(seen.append, "called")

    def sleep_fn() -> Any:
        return None if seen else 0.02

    assert js.submit(identity, args=(1,), sleep_fn=sleep_fn, timeout=PATIENCE).result(PATIENCE) == 1
