# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The end of a make by SIGKILL, in the middle of its work, with slots in its hands."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from mixed.census import look_up

if TYPE_CHECKING:
    from mixed.builders import Site
    from mixed.census import Census, Process
    from mixed.parts import Part


class Killed(NamedTuple):
    """What was done."""

    pid: int
    #: How many objects were complete, and how many compilers it had taken along.
    objects: int
    compilers: int


class Killer:
    """Kills the make of one part, once, as soon as it has something to show."""

    def __init__(self, site: Site, part: Part, census: Census) -> None:
        self.room = site.room(part)
        self.inner = str(self.room.relative_to(site.root))
        self.name = os.path.basename(site.tools.make.path)  # noqa: PTH119  # a name, not a path
        self.census = census

    def look(self) -> Killed | None:
        """Kill it, if it is time to.

        Nobody but it knows of its compilers: they would go on without a slot. So it is stopped, and
        they end before it does.
        """
        if not (self.objects() and self.census.count()[self.room.name]):
            return None
        make = self.find()
        if make is None:
            return None
        make.send(signal.SIGSTOP)
        self.await_stop(make)
        objects, compilers = self.objects(), self.census.count()[self.room.name]
        if not compilers or not make.is_alive():
            make.send(signal.SIGCONT)
            return None
        self.census.evict(self.inner, spare=make.pid)
        make.send(signal.SIGKILL)
        return Killed(make.pid, objects, compilers)

    def find(self) -> Process | None:
        """The make, if it runs."""
        found = [one for one in self.census.inhabitants(self.inner) if one.command == self.name]
        # A child of its own has its name until it becomes a shell.
        pids = {one.pid for one in found}
        return next((one for one in found if one.parent not in pids), None)

    def objects(self) -> int:
        """How many objects are complete."""
        return len(list(self.room.glob("*.o")))

    def await_stop(self, make: Process) -> None:
        """Wait until it does nothing more."""
        while (now := look_up(make.pid)) is not None and now.state != "T":
            time.sleep(0.001)
