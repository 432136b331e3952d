# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The main program's part: open a pool, submit the first job, watch, and leave nobody behind."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, NamedTuple

from jobserver import Jobserver
from jobserver.makeflags import DryRun, NoPoolOffered, PoolUnusable
from mixed.builders import Site
from mixed.census import Census
from mixed.jobs import Outcome, build_all
from mixed.killer import Killed, Killer
from mixed.parts import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from jobserver import Future
    from mixed.tools import Tools

#: Slots where neither the user nor a make says how many.
SLOTS = 2

#: Seconds between two looks at /proc.
GLANCE = 0.01


class WorkError(Exception):
    """The folder to work in cannot be used."""


class Pool(NamedTuple):
    """Where the slots come from."""

    jobserver: Jobserver
    #: None where the outer pool does not tell.
    slots: int | None
    outer: bool
    #: Why an outer pool that is there is not used.
    warning: str = ""


@dataclass(frozen=True)
class Run:
    """What has come of it, and how it went."""

    outcome: Outcome
    context: str
    slots: int | None
    outer: bool
    seconds: float
    looks: int
    peak: int
    peaks: Counter[str]
    killed: Killed | None
    #: The most compilers at once since then.
    peak_after: int
    #: Tokens that were free at the end.
    free: int


@contextmanager
def workplace(work: Path) -> Iterator[Path]:
    """An empty folder of our own, in a folder that is nobody else's."""
    mark = work / ".mixed-build"
    work.mkdir(parents=True, exist_ok=True)
    if not mark.exists() and any(work.iterdir()):
        raise WorkError(f"{work} is not empty, and not from an earlier run")
    with mark.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(f"another run is at work in {work}") from None
        root = work / "tree"
        if root.exists():
            shutil.rmtree(root)
        root.mkdir()
        yield root


def open_pool(context: str, slots: int | None, root: Path) -> Pool:
    """The slots asked for; else those of the make that has started us, or two.

    Raises DryRun where that make is only to say what it would do.
    """
    # All that works for us works in that folder: so it is known whom to count, and whom to stop.
    enter = functools.partial(os.chdir, root)
    if slots is not None:
        return Pool(Jobserver(context, slots, lend=True, preexec_fn=enter), slots, outer=False)
    try:
        joined = Jobserver.from_env(context, lend=True, preexec_fn=enter)
    except DryRun:
        raise
    except NoPoolOffered:
        return open_pool(context, SLOTS, root)
    except PoolUnusable as error:
        return open_pool(context, SLOTS, root)._replace(warning=f"{error}; using {SLOTS} slots")
    told = re.search(r"(?:^| )-?j(\d+)(?: |$)", os.environ.get("MAKEFLAGS", ""))
    return Pool(joined, int(told[1]) if told else None, outer=True)


def run(
    pool: Pool,
    root: Path,
    tools: Tools,
    *,
    kill_make: bool,
    on_objects: Callable[[int], None],
) -> Run:
    """Build everything."""
    start = time.perf_counter()
    with pool.jobserver as jobserver:
        site = Site(jobserver, root, tools)
        foreman = Foreman(site, kill_make, on_objects)
        outcome = foreman.supervise()
        seconds = time.perf_counter() - start
        return Run(
            outcome,
            jobserver.context.get_start_method(),
            pool.slots,
            pool.outer,
            seconds,
            foreman.looks,
            foreman.peak,
            foreman.peaks,
            foreman.killed,
            foreman.peak_after,
            count_tokens(jobserver),
        )


class Foreman:
    """Watches the jobs, and the compilers that they start."""

    def __init__(self, site: Site, kill_make: bool, on_objects: Callable[[int], None]) -> None:
        self.site = site
        self.on_objects = on_objects
        self.census = Census(site.root, site.tools.cc)
        made = next(part for part in PARTS if part.builder == "make")
        self.killer = Killer(site, made, self.census) if kill_make else None
        self.killed: Killed | None = None
        self.looks = self.peak = self.peak_after = 0
        self.peaks: Counter[str] = Counter()

    def supervise(self) -> Outcome:
        """Have everything built."""
        future = self.submit()
        try:
            while not future.wait(GLANCE):
                self.look()
        except BaseException:
            # A job that is killed may just have started another one.
            while not future.wait(GLANCE):
                self.census.evict()
            self.census.evict()
            raise
        self.on_objects(self.objects())
        return future.result()

    def submit(self) -> Future[Outcome]:
        """Start the first job, with SIGINT blocked.

        All other processes inherit that from it. So Ctrl-C, which a terminal sends to each of
        them, interrupts nobody but the main program, and that stops the others.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self.site.jobserver(build_all, self.site)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def look(self) -> None:
        """Count the compilers; kill the make, if that is wanted."""
        found = self.census.count()
        total = sum(found.values())
        self.looks += 1
        self.peak = max(self.peak, total)
        self.peaks |= found
        if self.killed:
            self.peak_after = max(self.peak_after, total)
        elif self.killer:
            self.killed = self.killer.look()
        self.on_objects(self.objects())

    def objects(self) -> int:
        """How many objects are complete."""
        return len(list(self.site.root.glob("rooms/*/*.o")))


def count_tokens(jobserver: Jobserver) -> int:
    """How many tokens are free, as the pool's own tool has it."""
    done = subprocess.run(
        [sys.executable, "-m", "jobserver", "status", "--json"],
        **jobserver.popen_kwargs(),
        stdout=subprocess.PIPE,
        check=True,
    )
    free: int = json.loads(done.stdout)["free"]
    return free
