# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The build tools that tests start, where they are installed.

Looked for on PATH, beside the interpreter (where the package `ninja` puts Kitware's), and in
JOBSERVER_MAKES and JOBSERVER_NINJAS: paths of more versions, separated as in PATH.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from typing import NamedTuple

import pytest


class Tool(NamedTuple):
    """A build tool and its version."""

    path: str
    version: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        name = self.kind + "-kitware" * self.is_kitwares
        return f"{name}-{'.'.join(map(str, self.version))}"

    @property
    def kind(self) -> str:
        """`make` or `ninja`."""
        return "ninja" if "ninja" in os.path.basename(self.path) else "make"

    @property
    def is_kitwares(self) -> bool:
        """Whether this is the ninja of Kitware, which has learnt the pipe style as well."""
        return "kitware" in self.text

    def knows(self, style: str) -> bool:
        """Whether it can take part in a pool that is offered in this style."""
        if self.kind == "ninja":
            return style != "pipe" or self.is_kitwares
        return style != "fifo" or self.version >= (4, 4)


def _found(variable: str, names: list[str]) -> list[Tool]:
    paths = os.environ.get(variable, "").split(os.pathsep)
    paths += [shutil.which(name) or "" for name in names]
    paths += [shutil.which(name, path=sysconfig.get_path("scripts")) or "" for name in names]
    tools: dict[tuple[tuple[int, ...], str], Tool] = {}
    for path in filter(None, paths):
        done = subprocess.run([path, "--version"], capture_output=True, text=True)
        numbers = re.search(r"\d+(\.\d+)+", done.stdout)
        if done.returncode == 0 and numbers is not None:
            version = tuple(map(int, numbers[0].split(".")))
            text = done.stdout.splitlines()[0]
            tools.setdefault((version, text), Tool(path, version, text))
    return list(tools.values())


@functools.cache
def makes() -> list[Tool]:
    """Each version of GNU make that there is."""
    found = _found("JOBSERVER_MAKES", ["make", "gmake", "make-4.4.1"])
    return [tool for tool in found if "GNU" in tool.text and tool.version >= (4, 2)]


@functools.cache
def ninjas() -> list[Tool]:
    """Each ninja that there is and that knows the jobserver."""
    found = _found("JOBSERVER_NINJAS", ["ninja", "ninja-1.13.2"])
    return [tool for tool in found if tool.version >= (1, 13)]


def each_make() -> pytest.MarkDecorator:
    """Parametrise a test that takes `make`."""
    return pytest.mark.parametrize("make", _or_skip(makes(), "GNU make"), ids=str)


def each_make_and_style() -> pytest.MarkDecorator:
    """Parametrise a test that takes `make` and `style`, a list of options for it."""
    cases: list[object] = []
    for make in makes():
        names = ["pipe", "fifo"] if make.version >= (4, 4) else [""]
        cases += [
            pytest.param(make, [f"--jobserver-style={name}"] if name else [], id=f"{make}-{name}")
            for name in names
        ]
    skipped = pytest.param(None, [], marks=pytest.mark.skip(reason="GNU make is not installed"))
    return pytest.mark.parametrize(("make", "style"), cases or [skipped])


def each_ninja() -> pytest.MarkDecorator:
    """Parametrise a test that takes `ninja`."""
    return pytest.mark.parametrize("ninja", _or_skip(ninjas(), "ninja 1.13 or later"), ids=str)


def each_builder() -> pytest.MarkDecorator:
    """Parametrise a test that takes `builder`, a make or a ninja."""
    return pytest.mark.parametrize(
        "builder", _or_skip([*makes(), *ninjas()], "neither GNU make nor ninja 1.13"), ids=str
    )


def _or_skip(tools: list[Tool], what: str) -> list[object]:
    skipped = pytest.param(None, marks=pytest.mark.skip(reason=f"{what} is not installed"))
    return list(tools) or [skipped]


def needs(name: str) -> pytest.MarkDecorator:
    """Skip a test where a command is not installed."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")


# What the tools are to build: each command of theirs passes a Gate (see helpers.py).

# $1 is the directory of the gate.
ENTER = """\
#!/bin/sh
touch "$1/in.$$"
while [ ! -d "$1/open" ]; do sleep 0.01; done
"""


def lay_out(directory: str, gate: str, count: int) -> None:
    """Write a Makefile and a build.ninja with `count` commands that can all run at once."""
    with open(os.path.join(directory, "enter"), "w") as stream:
        stream.write(ENTER)
    names = [f"job{number}" for number in range(count)]
    command = f"sh {directory}/enter {gate}"
    with open(os.path.join(directory, "Makefile"), "w") as stream:
        stream.write(f".PHONY: all {' '.join(names)}\nall: {' '.join(names)}\n")
        stream.write("".join(f"{name}:\n\t@{command}\n" for name in names))
        # Two makes below this one, which share what they have.
        stream.write("deep: deep0 deep1\ndeep0 deep1:\n\t+@$(MAKE) --no-print-directory $@-all\n")
        for deep in ("deep0", "deep1"):
            below = [f"{deep}-{name}" for name in names]
            stream.write(f"{deep}-all: {' '.join(below)}\n")
            stream.write("".join(f"{name}:\n\t@{command}\n" for name in below))
    with open(os.path.join(directory, "build.ninja"), "w") as stream:
        stream.write(f"rule enter\n command = {command}\n")
        stream.write("".join(f"build {name}: enter\n" for name in names))


def build(tool: str, directory: str, js: object, style: str, *goals: str) -> tuple[int, str]:
    """A job: start a tool that shares the slots of js; its exit status and what it said."""
    from jobserver import Jobserver

    assert isinstance(js, Jobserver)
    done = subprocess.run(
        [tool, *goals],
        **js.popen_kwargs(style),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr
