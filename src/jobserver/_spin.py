# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Look again and again for a moment before going to sleep.

To sleep and be woken takes tens of microseconds, most of all in a virtual machine, where a
processor with nothing to do goes back to the host. A short job's answer, and a worker's next job,
are often there sooner. So whoever is to wait for them spins first, for about as long as being woken
takes: if that was in vain it has cost as much again.

Guarantees:

* Who spins in vain soon hardly does: it leaves the next waits alone, each time twice as many, up to
  ``_MOST``. So long jobs cost no spinning.
* The processor is offered to others at each turn: what is waited for may need it. Where they keep
  it for long there is more to do than there are processors, and who yields is served after all
  others; so there the next ``_MANY`` waits are left alone. A process that sleeps is served sooner.
* Only a process with a single thread spins: others would want the interpreter.
"""

from __future__ import annotations

import threading
from os import sched_yield
from time import perf_counter
from typing import Any, Callable, Optional, TypeVar

T = TypeVar("T")

# In seconds: how long to spin, and when others have kept the processor for long. The scheduler's
# slices take some milliseconds.
_LASTS = 50e-6
_KEPT = 1e-3
_MOST = 255
_MANY = 1023

_threading: Any = threading


class Spin:
    """One place at which a process waits."""

    __slots__ = ("_left", "_penalty")

    def __init__(self) -> None:
        self._penalty = 0  # how many waits were left alone after the last spinning in vain
        self._left = 0  # so many are to be left alone from now on

    def until(self, look: Callable[[], Optional[T]]) -> Optional[T]:
        """
        Call ``look`` until it returns something true.

        Returns:
            What it has returned; None if that was nothing within the time, or if this is not the
            time to spin.
        """
        if self._left:
            self._left -= 1
            return None
        if len(_threading._active) != 1:
            return None
        now = perf_counter()
        end = now + _LASTS
        while now < end:
            found = look()
            if found:
                self._penalty >>= 1
                return found
            before = perf_counter()
            sched_yield()
            now = perf_counter()
            if now - before > _KEPT:
                self._left = _MANY
                return None
        self._left = self._penalty = min(2 * self._penalty + 1, _MOST)
        return None
