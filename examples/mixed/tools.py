# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The tools of this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class ToolError(Exception):
    """Something is not installed."""


class Tool(NamedTuple):
    """A builder."""

    path: str
    version: str


class Tools(NamedTuple):
    """What the build is done with."""

    #: A name, to be found on PATH: Makefiles have trouble with blanks in a path.
    cc: str
    nm: str
    make: Tool
    #: None where there is none that shares slots.
    ninja: Tool | None


def find_tools() -> Tools:
    """Find what is needed."""
    cc = next(filter(shutil.which, ("cc", "gcc")), None)
    if cc is None:
        raise ToolError("no C compiler: neither cc nor gcc is on PATH")
    nm = shutil.which("nm")
    if nm is None or shutil.which("ar") is None:
        raise ToolError("no binutils: neither ar nor nm may be missing on PATH")
    for name in ("make", "gmake"):
        version = version_of(name, r"GNU Make (\S+)")
        if version:
            return Tools(cc, nm, Tool(name, version), find_ninja())
    raise ToolError("no GNU make: neither make nor gmake on PATH is one")


def find_ninja() -> Tool | None:
    """A ninja that takes part in a jobserver: 1.13 or later, or one of Kitware's.

    Looked for on PATH, among this environment's commands, and in JOBSERVER_NINJAS.
    """
    beside = str(Path(sys.executable).with_name("ninja"))
    for path in ("ninja", beside, *os.environ.get("JOBSERVER_NINJAS", "").split(os.pathsep)):
        version = version_of(path, r"(\d\S*)") if path else ""
        numbers = re.findall(r"\d+", version)[:3]
        if tuple(map(int, numbers)) >= (1, 13) or "jobserver" in version:
            return Tool(path, ".".join(numbers))
    return None


def version_of(command: str, pattern: str) -> str:
    """What a command says that its version is; nothing if it does not or is not there."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    found = re.match(pattern, done.stdout)
    return found[1] if found else ""
