# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Three ways to build a library, each in a job of its own, all on the slots of one Jobserver."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jobserver import Jobserver
    from mixed.parts import Part
    from mixed.tools import Tools

#: A builder that is killed so often is not started again.
ATTEMPTS = 3

# Who is killed leaves half a file, which the next attempt must not take for a whole one. So a file
# gets its name when it is complete.
MAKEFILE = """\
.SUFFIXES:
{archive}: {objects}
	ar rcsD $@.part $^ && mv -f $@.part $@
"""
MAKE_RULE = """\
{target}: {source}
	{cc} {flags} -c -o $@.part $< && mv -f $@.part $@
"""
BUILD_NINJA = """\
rule cc
  command = {cc} {flags} -c -o $out.part $in && mv -f $out.part $out
rule ar
  command = ar rcsD $out.part $in && mv -f $out.part $out
build {archive}: ar {objects}
"""
NINJA_RULE = "build {target}: cc {source}\n"


class BuildError(Exception):
    """A library cannot be built."""


@dataclass(frozen=True)
class Site:
    """What all jobs of one build have in common."""

    jobserver: Jobserver
    #: Below it are the sources, a room for each part, and the artefacts.
    root: Path
    tools: Tools

    def room(self, part: Part) -> Path:
        """Where a part is built."""
        return self.root / "rooms" / part.name


class Built(NamedTuple):
    """A library, and how it was built."""

    part: Part
    how: str
    objects: int
    attempts: int
    seconds: float


def build(site: Site, part: Part) -> Built:
    """A job: build a library."""
    start = time.perf_counter()
    room = site.room(part)
    room.mkdir(parents=True)
    if part.builder == "jobs":
        how, attempts = build_by_jobs(site, part)
    elif part.builder == "ninja" and site.tools.ninja:
        how, attempts = build_by_ninja(site, part, site.tools.ninja.path)
    else:
        how, attempts = build_by_make(site, part)
    objects = len(list(room.glob("*.o")))
    return Built(part, how, objects, attempts, time.perf_counter() - start)


def build_by_make(site: Site, part: Part) -> tuple[str, int]:
    """Write a Makefile, and have make build what it says."""
    names = {"cc": site.tools.cc, "flags": " ".join(part.flags)}
    objects = " ".join(target for target, _ in part.compilations)
    text = MAKEFILE.format(archive=part.archive, objects=objects) + "".join(
        MAKE_RULE.format(target=target, source=source, **names)
        for target, source in part.compilations
    )
    (site.room(part) / "Makefile").write_text(text)
    how = f"make {site.tools.make.version}"
    if part.builder == "ninja":
        how += " (no ninja)"
    return how, run_builder(site, part, [site.tools.make.path])


def build_by_ninja(site: Site, part: Part, ninja: str) -> tuple[str, int]:
    """Write a build.ninja, and have ninja build what it says."""
    names = {"cc": site.tools.cc, "flags": " ".join(part.flags)}
    objects = " ".join(target for target, _ in part.compilations)
    text = BUILD_NINJA.format(archive=part.archive, objects=objects, **names) + "".join(
        NINJA_RULE.format(target=target, source=source) for target, source in part.compilations
    )
    (site.room(part) / "build.ninja").write_text(text)
    version = site.tools.ninja.version if site.tools.ninja else ""
    return f"ninja {version}", run_builder(site, part, [ninja, "--quiet"])


def run_builder(site: Site, part: Part, command: list[str]) -> int:
    """Run a builder on the slot of this job and on what else is free; how often it took."""
    attempt = 1
    while True:
        # Its commands write into the same pipes, so this ends when all of them have ended, also
        # when the builder itself was killed.
        done = site.jobserver.run(command, cwd=site.room(part), capture_output=True, text=True)
        if done.returncode == 0:
            return attempt
        if done.returncode > 0 or attempt == ATTEMPTS:
            raise BuildError(f"{command[0]} fails on {part.name}: {last_line(done)}")
        for path in site.room(part).glob("*.part"):
            path.unlink()
        attempt += 1


def build_by_jobs(site: Site, part: Part) -> tuple[str, int]:
    """Have a job of its own compile each file, and put the objects together in this one."""
    argses = [(site, part, target, source) for target, source in part.compilations]
    list(site.jobserver.map(compile_one, argses))
    objects = [target for target, _ in part.compilations]
    run_tool(site, part, ["ar", "rcsD", part.archive, *objects])
    return "nested Python jobs", 1


def compile_one(site: Site, part: Part, target: str, source: str) -> None:
    """A job: compile one file."""
    run_tool(site, part, [site.tools.cc, *part.flags, "-c", "-o", target, source])


def run_tool(site: Site, part: Part, command: list[str]) -> None:
    """Run a command that needs no slot but this job's."""
    done = subprocess.run(command, cwd=site.room(part), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{command[0]} fails on {part.name}: {last_line(done)}")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last thing that a command has said."""
    lines = (done.stdout + done.stderr).split("\n")
    said = [line for line in lines if line.strip()]
    return said[-1] if said else f"exit status {done.returncode}"
