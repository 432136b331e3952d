# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How a worker process comes to be, for each start method."""

from __future__ import annotations

from typing import Any, Optional, Protocol

from jobserver._flight import Flight, Started
from jobserver._worker._stay import Stays
from jobserver._worker._task import Task

from ._fork import ForkLauncher
from ._seat import Seat


class Launcher(Protocol):
    """One start method. The two steps are apart so that pickling happens under no lock."""

    def prepare(self, task: Task) -> Any:
        """Return what ``launch`` wants of a task; TypeError if it cannot be pickled."""
        ...

    def launch(self, prepared: Any, seat: Seat, stays: Optional[Stays]) -> Started:
        """Start a worker, for more than one job if it may stay; notes its channel as owned."""
        ...

    def deliver(self, prepared: Any, seat: Seat, started: Started) -> None:
        """Hand the worker its task, if it was not born with it; called under no lock."""
        ...

    def hand_over(self, prepared: Any, seat: Seat, worker: Flight, *, fresh: bool) -> bool:
        """
        Send a task to a worker that waits for one.

        Args:
            prepared: What ``prepare`` has returned.
            seat: What the job sits on.
            worker: Who waits, and is in the hand of this thread.
            fresh: The worker does not know the lease yet.

        Returns:
            False if the task cannot be sent, and will not be run by that worker.
        """
        ...


def launcher_for(method: str) -> Launcher:
    """Return the launcher for a start method."""
    if method == "fork":
        return ForkLauncher()
    from ._remote import RemoteLauncher

    return RemoteLauncher(method)
