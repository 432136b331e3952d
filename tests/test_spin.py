# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Looking again before going to sleep: who does, and when it is left."""

from __future__ import annotations

import os
import threading
from itertools import count
from typing import Any, Optional

import pytest
from helpers import PATIENCE

from jobserver import Jobserver, _spin
from jobserver._spin import _FEW, _KEPT, _LASTS, _LOOKS, _MANY, _PAID, _SHORT, Spin

waited: list[int] = []


def who_has_waited() -> list[int]:
    """The processes that have waited, as far as this one knows."""
    return waited


class Clock:
    """Time, and others who use the processor; both as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.kept = 1e-6  # for so long others run when the processor is yielded
        monkeypatch.setattr(_spin, "perf_counter", lambda: self.now)
        monkeypatch.setattr(_spin, "sched_yield", lambda: self.spend(self.kept))

    def spend(self, seconds: float) -> None:
        """Let some time go by."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still but for what the test lets happen."""
    return Clock(monkeypatch)


class Wait:
    """One wait, for something that comes at some time from now."""

    def __init__(self, spin: Spin, clock: Clock, seconds: float) -> None:
        self.looks = 0
        self.slept = False
        self._clock = clock
        self._at = clock.now + seconds
        assert spin.wait(self._look, self._sleep) == "it"

    def _look(self) -> Optional[str]:
        self.looks += 1
        return "it" if self._clock.now >= self._at else None

    def _sleep(self) -> str:
        self.slept = True
        self._clock.now = max(self._clock.now, self._at)
        return "it"


def waits_without_a_look(spin: Spin, clock: Clock) -> int:
    """How many short waits go by before one of them spins."""
    for left in count():
        if Wait(spin, clock, 0).looks:
            return left
        assert left <= _MANY + 1
    raise AssertionError


def test_what_is_there_is_found_by_one_look(clock: Clock) -> None:
    """Who spins looks before anything else, and no more once it has found something."""
    wait = Wait(Spin(), clock, 0)

    assert (wait.looks, wait.slept) == (1, False)


def test_what_comes_soon_is_found_without_sleep(clock: Clock) -> None:
    """Who spins goes on looking for as long as it is said to."""
    wait = Wait(Spin(), clock, _LASTS * 0.9)

    assert wait.looks > 10
    assert not wait.slept


def test_what_does_not_come_soon_is_slept_for(clock: Clock) -> None:
    """Who has spun in vain sleeps; if it was not in vain by much, it spins the next time, too."""
    spin = Spin()
    for _ in range(3):
        wait = Wait(spin, clock, (_LASTS + _SHORT) / 2)
        assert wait.looks
        assert wait.slept


def test_a_clock_that_stands_still_ends_spinning(clock: Clock) -> None:
    """Where a program has frozen its clock, as tests do, looking ends all the same."""
    clock.kept = 0
    wait = Wait(Spin(), clock, _SHORT)

    assert wait.looks <= _LOOKS
    assert wait.slept


def test_long_waits_are_slept_from_the_second_on(clock: Clock) -> None:
    """After a long wait nobody spins until a wait was short."""
    spin = Spin()
    assert Wait(spin, clock, _SHORT * 2).looks
    for _ in range(3):
        assert not Wait(spin, clock, _SHORT * 2).looks
    assert not Wait(spin, clock, _SHORT / 2).looks
    assert Wait(spin, clock, _SHORT / 2).looks


def test_a_busy_machine_is_left_alone(clock: Clock) -> None:
    """Where others keep the processor, many waits sleep at once before one spins again."""
    spin = Spin()
    clock.kept = _KEPT * 2
    assert Wait(spin, clock, _SHORT).looks == 1

    clock.kept = 0
    assert waits_without_a_look(spin, clock) >= _MANY


def test_a_machine_on_which_spinning_pays_is_not(clock: Clock) -> None:
    """Where spinning was of use many times, a single interruption does not count for much."""
    spin = Spin()
    for _ in range(_PAID):
        assert not Wait(spin, clock, _LASTS / 2).slept
    clock.kept = _KEPT * 2
    assert Wait(spin, clock, _SHORT).looks == 1

    clock.kept = 0
    assert _FEW <= waits_without_a_look(spin, clock) < _MANY


def test_a_process_with_threads_does_not_spin(clock: Clock) -> None:
    """Where another thread may want the interpreter nobody spins."""
    spin = Spin()
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        wait = Wait(spin, clock, 0)
        assert (wait.looks, wait.slept) == (0, True)
    finally:
        end.set()
        thread.join()

    assert Wait(spin, clock, 0).looks == 1


def test_failure_to_sleep_comes_through(clock: Clock) -> None:
    """What waiting raises is raised, and the next wait is as if it had not been."""

    def refuse() -> str:
        clock.spend(_SHORT * 2)
        raise BlockingIOError

    spin = Spin()
    with pytest.raises(BlockingIOError):
        spin.wait(lambda: None, refuse)

    assert Wait(spin, clock, 0).looks == 1


def test_submitters_and_workers_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for an answer, and a worker that waits for its next job, spins."""
    wait = Spin.wait

    def noting(spin: Spin, look: Any, sleep: Any) -> Any:
        waited.append(os.getpid())
        return wait(spin, look, sleep)

    waited.clear()
    monkeypatch.setattr(Spin, "wait", noting)
    with Jobserver("fork", 1, max_tasks_per_child=None) as js:
        worker = js.submit(os.getpid).result(PATIENCE)
        assert worker in js.submit(who_has_waited).result(PATIENCE)
    assert os.getpid() in waited
