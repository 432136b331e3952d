# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Which processes take part in a pool: those that have its FIFO open."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import NamedTuple, Optional


class Peer(NamedTuple):
    """
    A process that has the FIFO open.

    ``parked`` is how many tokens it holds in berths; what it holds in its memory, as foreign
    clients do, cannot be seen. ``since`` is when it was started, in seconds since the epoch.
    """

    pid: int
    command: str
    since: float
    parked: int


def peers_of(fifo: int) -> list[Peer]:
    """Return the processes that have the FIFO behind a descriptor open, as far as can be seen."""
    wanted = os.fstat(fifo)
    locks = _locks()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            # It may end while it is looked at, or be somebody else's.
            with contextlib.suppress(OSError, ValueError):
                inodes = _open_pipes(int(name), wanted.st_dev, wanted.st_ino)
                if inodes is not None:
                    parked = sum(locks[int(name), inode] for inode in inodes)
                    found.append(Peer(int(name), _command(name), _started(name), parked))
    return sorted(found)


def _open_pipes(pid: int, device: int, inode: int) -> Optional[set[int]]:
    """Return the inodes of the pipes that a process has open; None if the one sought is not."""
    directory = f"/proc/{pid}/fd"
    pipes = set()
    takes_part = False
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):
            status = os.stat(f"{directory}/{name}")
            takes_part = takes_part or (status.st_dev, status.st_ino) == (device, inode)
            pipes.add(status.st_ino)
    return pipes - {inode} if takes_part else None


def _locks() -> Counter[tuple[int, int]]:
    """Return the file locks that there are, by process and inode."""
    found: Counter[tuple[int, int]] = Counter()
    with contextlib.suppress(OSError), open("/proc/locks") as stream:
        for line in stream:
            words = line.split()
            if "FLOCK" in words and "->" not in words:
                place = words.index("FLOCK")
                found[int(words[place + 3]), int(words[place + 4].rpartition(":")[2])] += 1
    return found


def _command(name: str) -> str:
    with open(f"/proc/{name}/cmdline", "rb") as stream:
        return stream.read().replace(b"\0", b" ").decode(errors="replace").strip()


def _started(name: str) -> float:
    with open(f"/proc/{name}/stat", "rb") as stream:
        ticks = int(stream.read().rpartition(b")")[2].split()[19])
    boot = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return boot + ticks / os.sysconf("SC_CLK_TCK")
