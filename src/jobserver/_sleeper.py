# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
One thread's waiting: until when, and how it is woken while another thread polls.

On a lock of its own: neither `threading.Event` nor `Condition` stands a signal handler that raises.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Optional


class Sleeper:
    """One waiting thread that does not poll."""

    __slots__ = ("_lock", "seeks", "target")

    def __init__(self, target: Optional[object], *, seeks: bool) -> None:
        self.target = target
        self.seeks = seeks
        self._lock = threading.Lock()
        self._lock.acquire()

    def sleep(self, pause: Optional[float]) -> bool:
        """Sleep until woken; True when the pause was over first."""
        return not self._lock.acquire(timeout=-1 if pause is None else pause)

    def wake(self) -> None:
        """Wake the thread, now or when it next sleeps."""
        if self._lock.locked():
            with suppress(RuntimeError):  # another thread has just woken it
                self._lock.release()


def pause_until(deadline: Optional[float], tick: Optional[float]) -> Optional[float]:
    """Return how many seconds to sleep at most; None for as long as it takes."""
    if deadline is None:
        return tick
    # A day at a time: neither epoll nor a lock can count to the end of a very long timeout.
    return min(deadline - time.monotonic(), 86400.0 if tick is None else tick)
