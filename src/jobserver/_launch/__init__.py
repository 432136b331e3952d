# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How a worker process comes to be, for each start method."""

from __future__ import annotations

from typing import Any, Protocol

from jobserver._flight import Started
from jobserver._worker._task import Task

from ._fork import ForkLauncher
from ._seat import Seat


class Launcher(Protocol):
    """One start method. The two steps are apart so that pickling happens under no lock."""

    def prepare(self, task: Task) -> Any:
        """Return what ``launch`` wants of a task; TypeError if it cannot be pickled."""
        ...

    def launch(self, prepared: Any, seat: Seat) -> Started:
        """Start a worker; its channel is noted in ``_forking.owned``."""
        ...

    def deliver(self, prepared: Any, seat: Seat, started: Started) -> None:
        """Hand the worker its task, if it was not born with it; called under no lock."""
        ...


def launcher_for(method: str) -> Launcher:
    """Return the launcher for a start method."""
    if method == "fork":
        return ForkLauncher()
    from ._remote import RemoteLauncher

    return RemoteLauncher(method)
