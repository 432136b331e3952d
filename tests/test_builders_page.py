# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The page on builders: its files and commands do together what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from foreign import ninjas
from helpers import program_environment

PAGE = Path(__file__).resolve().parents[1] / "docs" / "builders.md"
FILE = re.compile(
    r"^The file `(?P<name>[^`]+)`:\n+```[^\n]*\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
COMMAND = re.compile(r"^```console\n\$ (?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SECTIONS = dict(section.split("\n", 1) for section in PAGE.read_text().split("\n## ")[1:])
RUN = [title for title, text in SECTIONS.items() if COMMAND.search(text)]


def prepare(directory: Path, text: str) -> dict[str, str]:
    """Write the files of a section; the environment for its commands."""
    for match in FILE.finditer(text):
        path = directory / match["name"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(match["text"])
    tools = directory / "bin"
    tools.mkdir()
    for name, command in (("python", ""), ("jobserver", "-m jobserver")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (tools / name).chmod(0o755)
    for ninja in ninjas()[:1]:
        (tools / "ninja").symlink_to(ninja.path)
    env = program_environment()
    return {**env, "PATH": f"{tools}{os.pathsep}{env['PATH']}"}


def missing(text: str) -> str:
    """A tool that a section needs and that is not installed."""
    for name in ("make", "cargo"):
        wanted = re.search(rf"^\$ .*\b{name}\b|\"{name}\"", text, re.MULTILINE)
        if wanted and shutil.which(name) is None:
            return name
    return (
        "ninja 1.13" if re.search(r"^\$ .*\bninja\b", text, re.MULTILINE) and not ninjas() else ""
    )


@pytest.mark.contract("K4", "K6", "K9")
@pytest.mark.parametrize("title", RUN)
def test_section(title: str, tmp_path: Path) -> None:
    """The commands of a section print what the page shows below them, and nothing else."""
    text = SECTIONS[title]
    if missing(text):
        pytest.skip(f"{missing(text)} is not installed")
    env = prepare(tmp_path, text)
    for block in COMMAND.finditer(text):
        for step in block["text"].split("\n$ "):
            command, _, expected = step.partition("\n")
            done = subprocess.run(
                ["sh", "-c", command],
                cwd=tmp_path,
                env=env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=50,
            )
            assert (done.stdout, done.stderr) == (expected.rstrip("\n") + "\n" * bool(expected), "")


def test_every_command_is_run() -> None:
    """No command of the page escapes the search."""
    text = PAGE.read_text()

    assert len(RUN) >= 7
    assert len(COMMAND.findall(text)) == text.count("```console")
    assert len(FILE.findall(text)) == text.count("The file `")
