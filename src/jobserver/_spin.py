# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Look again and again for a moment before going to sleep.

To sleep and be woken takes tens of microseconds, most of all in a virtual machine, where a
processor with nothing to do goes back to the host. A short job's answer, and a worker's next job,
are often there sooner. So whoever is to wait for them spins first.

Guarantees:

* Who has just waited for longer than ``_SHORT`` does not spin. So long jobs cost no spinning.
* The processor is offered to others at each turn: what is waited for may need it. Where they keep
  it for long there is more to do than there are processors, and who yields is served after all
  others, where one who sleeps would be served soon. Unless spinning had paid for that many times
  over, so many waits are left alone then that it hardly happens.
* Only a process with a single thread that Python knows of spins: others would want the interpreter.
* It ends by the number of looks as well, as a program's tests may have frozen the clock.
"""

from __future__ import annotations

import threading
from os import sched_yield
from time import perf_counter
from typing import Any, Callable, Optional, TypeVar

T = TypeVar("T")

# In seconds: how long to spin, and after waits of which length.
_LASTS = 100e-6
_SHORT = 250e-6
_LOOKS = 256  # several times as many as there is time for
# When others have kept the processor for long: the scheduler's slices take some milliseconds, and
# another worker's short job much less than one.
_KEPT = 1e-3
# How many waits are then left alone; and how many if spinning was of use so many times before.
_MANY = 1023
_FEW = 15
_PAID = 256

_threading: Any = threading


class Spin:
    """One place at which a process waits."""

    __slots__ = ("_left", "_short", "_useful")

    def __init__(self) -> None:
        self._short = True  # the last wait was
        self._left = 0  # how many waits are to be left alone
        self._useful = 0  # how many times spinning was since others last kept the processor

    def wait(self, look: Callable[[], Optional[T]], sleep: Callable[[], T]) -> T:
        """
        Wait by calling ``look`` until it returns something true, or else by ``sleep``.

        Args:
            look: Says what has come, without waiting.
            sleep: Waits for it.

        Returns:
            What the one or the other has returned.
        """
        if self._left > 0:  # it may be less: a signal handler that waits may come in between here
            self._left -= 1
            return sleep()
        begin = perf_counter()
        if self._short and len(_threading._active) == 1:
            found = self._spin(look, begin)
            if found:
                return found
        slept = sleep()
        self._short = perf_counter() - begin < _SHORT
        return slept

    def _spin(self, look: Callable[[], Optional[T]], now: float) -> Optional[T]:
        end = now + _LASTS
        for _ in range(_LOOKS):
            found = look()
            if found:
                self._useful += 1
                return found
            before = perf_counter()
            sched_yield()
            now = perf_counter()
            if now - before > _KEPT:
                self._left = _MANY if self._useful < _PAID else _FEW
                self._useful = 0
            if now >= end:
                break
        return None
