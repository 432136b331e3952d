# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The examples run as the scripts that they are, and print what their how-to pages say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jobserver

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
HOWTO = ROOT / "docs" / "howto"

# The main jobs have tests of their own: they are programs rather than the answer to one question.
NAMES = sorted(
    path.stem
    for path in EXAMPLES.glob("*.py")
    if not path.stem.startswith(("_", "archive", "mixed"))
)
# None runs the example as a reader would first: without an argument.
CONTEXTS = (None, "fork", "spawn", "forkserver")


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder where interpreters leave what they have compiled for the next ones."""
    return tmp_path_factory.mktemp("bytecode")


def run_example(name: str, context: str | None, bytecode: Path) -> subprocess.CompletedProcess[str]:
    """Run one example in an interpreter of its own, from a directory that is not its own."""
    env = dict(os.environ)
    # Spawned workers import much: where nothing is or may be cached, that takes most of the time.
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    env["PYTHONPYCACHEPREFIX"] = str(bytecode)
    # The code under test is the one that this process imported, installed or not.
    source = str(Path(jobserver.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (source, env.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "default::ResourceWarning", str(EXAMPLES / f"{name}.py")]
    command += [] if context is None else [context]
    with subprocess.Popen(
        command,
        cwd="/",
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            # Nobody may hold the pipes after the script has ended: that would be a leftover.
            stdout, stderr = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def promised_output(name: str) -> str:
    """Return what the how-to page of an example says that it prints."""
    blocks = re.findall(
        r"^```text\n(.*?)^```$", (HOWTO / f"{name}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) == 1, f"{name}.md must show one output"
    return str(blocks[0])


def test_promised_questions_are_answered() -> None:
    """Every subject that the project promises an example for has one."""
    assert set(NAMES) == {
        "callbacks",
        "cancelling",
        "environment",
        "executor",
        "gating",
        "killed_worker",
        "large_data",
        "nesting",
        "parent_death",
        "sharing",
        "submitting",
        "threads",
        "timeouts",
        "warm",
    }


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_example_prints_what_its_page_says(name: str, context: str | None, bytecode: Path) -> None:
    """An example prints the same in every start method, and warns and complains of nothing."""
    done = run_example(name, context, bytecode)

    assert done.stderr == ""
    assert done.stdout == promised_output(name)
    assert done.returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_example_has_a_page(name: str) -> None:
    """The page of an example asks the example's own question and includes its code."""
    docstring = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    page = (HOWTO / f"{name}.md").read_text()

    assert page.startswith(f"# {docstring}\n")
    assert f"```{{literalinclude}} ../../examples/{name}.py\n" in page
    assert "## What to watch out for\n" in page


def test_index_lists_every_page() -> None:
    """The table of contents names each page once, and no page that does not exist."""
    toctree = re.search(
        r"^```{toctree}\n(.*?)^```$", (HOWTO / "index.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert toctree is not None
    entries = [line for line in toctree[1].splitlines() if line and not line.startswith(":")]

    assert sorted(entries) == NAMES
    assert {path.stem for path in HOWTO.glob("*.md")} == {*NAMES, "index"}
