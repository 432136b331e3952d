# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Which processes work in a folder, and how many of them are compilers, as /proc has it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: What a command's name is cut to in /proc.
COMM = 15

#: Seconds that a process may take to end of SIGKILL.
PATIENCE = 30.0


class Process(NamedTuple):
    """A process that is alive."""

    pid: int
    parent: int
    state: str
    command: str
    #: With the process id it names one process for ever.
    started: int

    def send(self, signum: int) -> None:
        """Send a signal to this process, and to no other that has come to have its number."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_alive():
                    signal.pidfd_send_signal(descriptor, signum)
            finally:
                os.close(descriptor)

    def is_alive(self) -> bool:
        """Whether it has not ended since."""
        now = look_up(self.pid)
        return now is not None and now.started == self.started


def look_up(pid: int) -> Process | None:
    """A process; None when it has ended, be it a zombie still."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:  # noqa: PTH123  # thousands of times
            head, _, tail = stream.read().rpartition(b")")
    except OSError:
        return None
    fields = tail.split()
    state = fields[0].decode()
    if state in "ZX":
        return None
    name = os.fsdecode(head.partition(b"(")[2])
    return Process(pid, int(fields[1]), state, name, int(fields[19]))


class Census:
    """Looks at the processes that work in a folder or below, and that are younger than itself.

    Where they work is known also of those whose parent has been killed.
    """

    def __init__(self, root: Path, compiler: str) -> None:
        self.root = os.path.realpath(root)
        self.elders = set(os.listdir("/proc"))  # noqa: PTH208  # names are what is wanted
        #: A driver, and what it starts for C.
        self.compilers = {compiler[:COMM], "cc1"}

    def inhabitants(self, room: str = "") -> Iterator[Process]:
        """Those who work in the folder, or in one of its rooms."""
        for name in os.listdir("/proc"):  # noqa: PTH208  # names are what is wanted
            if name.isdigit() and name not in self.elders and self.is_in(self.place(name), room):
                found = look_up(int(name))
                if found is not None:
                    yield found

    def place(self, pid: int | str) -> str:
        """Where a process works; nothing when that is unknown."""
        try:
            return os.readlink(f"/proc/{pid}/cwd")  # noqa: PTH115  # a name is what is wanted
        except OSError:
            return ""

    def is_in(self, place: str, room: str) -> bool:
        """Whether a place is a room of the folder, or below one."""
        top = f"{self.root}/{room}" if room else self.root
        return place == top or place.startswith(f"{top}/")

    def count(self) -> Counter[str]:
        """How many compilers are alive at one instant, by the name of their room's folder."""
        found = [
            (process, os.path.basename(self.place(process.pid)))  # noqa: PTH119  # of a name
            for process in self.inhabitants()
            if process.command in self.compilers
        ]
        # One may have ended, and the next one begun on its slot, while the list was made. Those
        # that are still alive now that it is complete were alive together when it was.
        alive = [(process, room) for process, room in found if process.is_alive()]
        pids = {process.pid for process, _ in alive}
        # A driver and the compiler proper below it are one compilation.
        return Counter(room for process, room in alive if process.parent not in pids)

    def evict(self, room: str = "", spare: int = 0) -> None:
        """Kill all who work in the folder, or in one of its rooms, and wait for their ends."""
        deadline = time.monotonic() + PATIENCE
        while victims := [one for one in self.inhabitants(room) if one.pid != spare]:
            for victim in victims:
                victim.send(signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{victims} do not end")
            time.sleep(0.005)
