# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What every case shares with its workers: the jobs, and what a system under test offers.

Under spawn and forkserver a worker imports this module, and the case itself, anew: so they import
next to nothing.
"""

from __future__ import annotations

import os
import time
from typing import Any


class Unavailable(Exception):
    """This system, or this version of it, cannot do what the row asks for."""


class System:
    """One way to run jobs, on a number of slots; a case fills in what its package offers."""

    #: Whether a crowd of jobs is run by ``map`` rather than by ``submit``.
    by_map = False
    #: Whether the object itself may be an argument of its own jobs.
    travels = False

    def submit(self, fn: Any, *args: Any) -> Any:
        """Start a job, and return what ``result`` takes."""
        raise Unavailable("it has no call that submits one job")

    def result(self, handle: Any) -> Any:
        """Wait for a job, and return what it returned."""
        return handle.result()

    def map(self, fn: Any, items: Any) -> Any:
        """Run fn for each item, and return an iterable of the results."""
        raise Unavailable("it has no map")

    def burst(self, count: int) -> None:
        """Run so many jobs that do nothing, all at once, and take their results."""
        if self.by_map:
            for _ in self.map(nothing_with, range(count)):
                pass
            return
        handles = [self.submit(nothing) for _ in range(count)]
        for handle in handles:
            self.result(handle)

    def once(self) -> None:
        """Run one job that does nothing, and take its result."""
        self.result(self.submit(nothing))

    def close(self) -> None:
        """End all workers."""


def nothing() -> None:
    """Do nothing."""


def nothing_with(item: object) -> None:
    """Do nothing with an item."""


def sleep(seconds: float) -> None:
    """Take time, but no CPU."""
    time.sleep(seconds)


def pass_gate(path: str) -> None:
    """Stay until somebody opens the FIFO for writing."""
    os.close(os.open(path, os.O_RDONLY))


def arrival(data: object) -> float:
    """When this job began to run, its argument at hand: the clock is one for all processes."""
    return time.monotonic()


def departure(kind: str, size: int) -> tuple[float, Any]:
    """Return data, and when it was ready to be returned."""
    data = make_data(kind, size)
    return time.monotonic(), data


def make_data(kind: str, size: int) -> Any:
    """Return so many bytes that are really in memory."""
    if kind == "bytearray":
        return bytearray(b"\x01") * size
    try:
        import numpy as np
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return np.ones(size // 8)
