# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Each program in the README and the documentation runs, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Optional

import pytest

import jobserver

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A Python block, what is said right above it, and the output that is promised right below it.
BLOCK = re.compile(
    r"(?P<above>[^\n]*)\n+"
    r"^```python\n(?P<code>.*?)^```$"
    r"(?:\n+(?:It prints|This prints)[^\n]*:\n+```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
# A block that is no program of its own says so, and why: `<!-- no-run: reason -->`.
NO_RUN = re.compile(r"<!-- no-run: \S.* -->")


class Program(NamedTuple):
    """A program found in a page."""

    page: str
    line: int
    above: str
    code: str
    output: Optional[str]


def programs(page: Path) -> list[Program]:
    """The Python blocks of a page."""
    text = page.read_text()
    name = str(page.relative_to(ROOT))
    return [
        Program(
            name,
            text.count("\n", 0, match.start("code")) + 1,
            match["above"],
            match["code"],
            match["output"],
        )
        for match in BLOCK.finditer(text)
    ]


ALL = [program for page in PAGES for program in programs(page)]
RUN = [program for program in ALL if not NO_RUN.fullmatch(program.above)]


@pytest.mark.parametrize("program", RUN, ids=lambda p: f"{p.page}:{p.line}")
def test_program_runs(program: Program, tmp_path: Path) -> None:
    """A program in the documentation works when copied into a file, and its output is as shown."""
    script = tmp_path / "program.py"
    script.write_text(program.code)
    env = dict(os.environ)
    # The code under test is the one that this process imported, installed or not.
    source = str(Path(jobserver.__file__).resolve().parents[1])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (source, env.get("PYTHONPATH"))))

    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50,
    )

    assert done.stderr == ""
    assert done.returncode == 0
    if program.output is not None:
        assert done.stdout == program.output


def test_every_block_is_found() -> None:
    """No Python block escapes the search, and the README and the guide have some."""
    fences = sum(len(re.findall(r"^\s*```\s*py", page.read_text(), re.MULTILINE)) for page in PAGES)

    assert len(ALL) == fences
    assert {"README.md", "docs/guide.md"} <= {program.page for program in RUN}


def test_fragments_are_rare() -> None:
    """Nearly every Python block is a program that runs."""
    assert len(ALL) - len(RUN) <= len(ALL) // 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A relative link in a page names a file of the project."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    local = [
        target for target in targets if "://" not in target and not target.startswith("mailto")
    ]

    assert [target for target in local if not (page.parent / target).exists()] == []


def test_make_targets_exist() -> None:
    """Every `make target` that the documentation names is a target of the Makefile."""
    pages = [*PAGES, ROOT / "CONTRIBUTING.md"]
    named = {
        target for page in pages for target in re.findall(r"`make ([a-z][a-z-]*)", page.read_text())
    } | {
        target
        for page in pages
        for target in re.findall(r"^make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE)
    }
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert {"demo", "test"} <= named
    assert named <= targets
