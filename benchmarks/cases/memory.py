# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Memory: how much a process and its descendants have, and how to have more on purpose."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Optional

import sampler
from workload import Unavailable

MEGABYTE = 1 << 20

#: Small enough to be on pages of its own kind: large blocks would be mapped apart.
PIECE = 4_000

MODULE = '''"""One of many modules, of a common size."""

NAMES = {{f"name {{index}} of {number}": [index, str(index)] for index in range(200)}}


class Record:
    """Something with methods."""

    kind = "record {number}"

    def __init__(self, first, second=None, *, third=3):
        self.first, self.second, self.third = first, second, third

    def total(self):
        """Add what can be added."""
        return sum(part for part in (self.first, self.second, self.third) if part)
'''
FUNCTION = '''

def function_{index}(first, second={index}, *rest, **named):
    """Return something made of the arguments."""
    found = [first, second, *rest, *named.values()]
    for position, item in enumerate(found):
        if item == {index}:
            return position, "found {index}"
    return len(found), NAMES.get(f"name {{second}}")
'''


def ballast(megabytes: int) -> list[bytes]:
    """Return so much memory, in pieces as a program that has read much has it."""
    return [b"%09d" % index * (PIECE // 9) for index in range(megabytes * MEGABYTE // PIECE)]


def import_modules(count: int) -> list[ModuleType]:
    """Import so many modules that are written for it."""
    if not count:
        return []
    directory = tempfile.mkdtemp()
    sys.path.insert(0, directory)
    try:
        names = [f"one_of_many_{number}" for number in range(count)]
        functions = "".join(FUNCTION.format(index=index) for index in range(20))
        for number, name in enumerate(names):
            Path(directory, f"{name}.py").write_text(MODULE.format(number=number) + functions)
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(directory)
        shutil.rmtree(directory)


class Peak:
    """The most proportional memory that this process and its descendants have meanwhile."""

    #: How many bytes more than at the beginning; known at the end.
    grown = 0

    def __enter__(self) -> Peak:  # noqa: PYI034  # Self is newer than Python 3.9
        command = [sys.executable, "-E", "-S", sampler.__file__, str(os.getpid())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self._before = int(self._process.stdout.readline())
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        where: Optional[TracebackType],
    ) -> None:
        output, _ = self._process.communicate("")
        self.grown = int(output) - self._before


def of_workers(*, server: bool) -> dict[str, float]:
    """What the workers of this process have, on average, and the process they were forked from."""
    parents = sampler.parents()
    children = [
        pid
        for pid in sampler.descendants(os.getpid(), parents)
        if "resource_tracker" not in command_of(pid)
    ]
    direct = [pid for pid in children if parents[pid] == os.getpid()]
    servers = direct if server else []
    workers = [pid for pid in children if pid not in servers]
    found = {}
    for name, pids in (("worker", workers), ("server", servers)):
        for key in ("Rss", "Pss", "Private") if pids else ():
            total = sum(sampler.memory_of(pid, key) for pid in pids)
            found[f"{name}_{key.lower()}_mb"] = total / len(pids) / MEGABYTE
    if not found:
        raise Unavailable("no worker outlives its job")
    return found


def command_of(pid: int) -> str:
    """The command line of a process; of one that has gone, nothing."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


class Room:
    """Whether the memory is enough for many processes: the first ones tell."""

    SAMPLES = (100, 1_000)

    def __init__(self, count: int) -> None:
        self.count = count
        self.before = available()

    def check(self, running: int) -> None:
        """Raise Unavailable as soon as it is known not to be enough."""
        if running not in self.SAMPLES or running == self.count:
            return
        # What has been submitted need not have started yet.
        time.sleep(0.2)
        needed = max(0, self.before - available()) / running * self.count
        if needed > self.before * 0.7:
            raise Unavailable(f"{self.count} at once would need {needed / 1024:.0f} GB")


def available() -> float:
    """How many megabytes the machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1024
    raise Unavailable("the kernel does not tell how much memory is available")


def raise_descriptor_limit() -> None:
    """Allow as many descriptors as may be had."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
