# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How much memory this process has, and how much more it may have. Linux; OSError elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_CGROUPS = "/sys/fs/cgroup"
_GROUPS = "/proc/self/cgroup"
# What a control group tells of its memory, in both versions: where, the limits, what is in use, and
# what of that is easily had back.
_FILES = {
    "": ("", ("memory.max", "memory.high"), "memory.current", b"inactive_file"),
    "memory": (
        "/memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        b"total_inactive_file",
    ),
}


def resident() -> int:
    """Return how many bytes of this process are in memory (proc_pid_statm(5))."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available() -> int:
    """Return how many bytes can be had before anything is swapped or killed for it."""
    with open("/proc/meminfo", "rb") as file:
        machine = _numbers(file.read())[b"MemAvailable:"] * 1024
    return min([machine, *_groups()])


def _groups() -> Iterator[int]:
    """Yield what each control group that this process is in, with a limit, has left."""
    with open(_GROUPS, encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read().splitlines()
    for line in lines:
        _number, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _FILES:
                continue
            mount, limits, usage, cache = _FILES[controller]
            # A container may see the path of the host, and only its own group, as the root.
            while True:
                directory = _CGROUPS + mount + path
                for limit in limits:
                    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is "max"
                        yield _left(directory, limit, usage, cache)
                if path in ("", "/"):
                    break
                path = path.rpartition("/")[0]


def _left(directory: str, limit: str, usage: str, cache: bytes) -> int:
    most = int(_read(directory, limit))  # first, as mostly there is none, and no more to be read
    used = int(_read(directory, usage))
    # What was read from files and not used since makes room when room is wanted.
    return max(0, most - used + _numbers(_read(directory, "memory.stat"))[cache])


def _read(directory: str, name: str) -> bytes:
    with open(os.path.join(directory, name), "rb") as file:
        return file.read()


def _numbers(table: bytes) -> dict[bytes, int]:
    """Read lines of a name and a number."""
    return {words[0]: int(words[1]) for words in map(bytes.split, table.splitlines())}
