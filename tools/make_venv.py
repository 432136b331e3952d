# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Make a virtual environment for the interpreter that runs this script.

    python tools/make_venv.py DIRECTORY

Some interpreters come without ensurepip (a distribution may package it apart), so the environment
gets its pip from ensurepip where there is one, else by any pip at hand.  Everything is fetched by
pip as it is configured on the machine.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 9)
QUIET = ["-qq", "--disable-pip-version-check", "--no-input"]


def run(*command: str) -> bool:
    """True when the command succeeded."""
    return subprocess.run(command, check=False).returncode == 0


def has_pip(python: str) -> bool:
    """True when an interpreter is there, and has a pip."""
    command = [python, "-m", "pip", "--version"]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def fetch_pip(python: Path) -> bool:
    """Have any pip at hand download a pip that suits `python`, straight into its site-packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    target = subprocess.check_output([str(python), "-c", code], text=True).strip()
    version = "{}.{}".format(*sys.version_info[:2])
    options = ["--target", target, "--python-version", version, "--only-binary", ":all:"]
    helpers = [sys.executable, ".venv/bin/python", "python3", "python"]
    return any(
        has_pip(helper) and run(helper, "-m", "pip", "install", *QUIET, *options, "pip")
        for helper in helpers
    )


def main(directory: Path) -> str | int:
    """Make the environment; the exit status, or the message that says why it cannot be."""
    if sys.version_info < OLDEST:
        return f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is older."
    with_pip = find_spec("ensurepip") is not None
    venv.create(directory, clear=True, symlinks=True, with_pip=with_pip)
    python = directory / "bin" / "python"
    if not with_pip and not fetch_pip(python):
        return f"No pip for {sys.executable}: neither ensurepip nor another pip helped."
    # Dependency groups need a pip of 2025 or later.
    if not run(str(python), "-m", "pip", "install", *QUIET, "--upgrade", "pip>=25.1"):
        return "pip could not be brought up to date."
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
