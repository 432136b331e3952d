# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How a worker process comes to be, for each start method."""

from __future__ import annotations

from typing import Any, Optional, Protocol

from jobserver._flight import Flight
from jobserver._slots._lease import Lease
from jobserver._worker._stay import Stays
from jobserver._worker._task import Task

from ._fork import ForkLauncher


class Launcher(Protocol):
    """One start method."""

    def prepare(self, task: Task) -> Any:
        """Return what ``launch`` wants of a task; TypeError if it cannot be pickled."""
        ...

    def launch(
        self, prepared: Any, lease: Optional[Lease], bell: int, stays: Optional[Stays]
    ) -> Flight:
        """
        Start a worker that has its task. The caller has signals wait, as for `hand_over`.

        Args:
            prepared: What ``prepare`` has returned.
            lease: What the job runs on; None for no slot.
            bell: What it is to ring, -1 for nothing.
            stays: How long the worker may stay; None for one job.

        Returns:
            What is not tracked yet; its channel is noted as owned.
        """
        ...

    def hand_over(self, prepared: Any, lease: Lease, bell: int, worker: Flight) -> bool:
        """
        Send a task to a worker that waits for one.

        Args:
            prepared: What ``prepare`` has returned.
            lease: What the job runs on.
            bell: What it is to ring, -1 for nothing.
            worker: Who waits, and is in the hand of this thread.

        Returns:
            False if the task cannot be sent, and will not be run by that worker.
        """
        ...


def launcher_for(method: str, key: tuple[int, int]) -> Launcher:
    """Return the launcher for a start method, and for the pool of that key."""
    if method == "fork":
        return ForkLauncher(key)
    from ._remote import RemoteLauncher

    return RemoteLauncher(method, key)
