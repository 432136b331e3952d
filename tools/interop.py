# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Print the tables of docs/interop.md: each tool at hand, in both roles and each style.

To be run where the tests can be run: `.venv/bin/python tools/interop.py`. JOBSERVER_MAKES and
JOBSERVER_NINJAS name more tools, as for the tests.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import interop  # noqa: E402  # it is among the tests
from helpers import Gate  # noqa: E402

#: Seconds in which more commands than there are slots would show themselves.
SETTLE = 1.0


def our_slots() -> None:
    """Print what the tools make of slots of ours."""
    head("Tool", "Style", "`js.run`", "`js.child_env`", "Slots back", "It says")
    for case in interop.build_cases():
        if case.how != "run":
            continue
        both = [serve(each) for each in (case, case._replace(how="child_env"))]
        row(
            case.tool,
            case.style,
            *(outcome(case, seen) for seen in both),
            f"{min(seen.back for seen in both)} of {interop.SLOTS}",
            "" if interop.understands(case) else remark(both[0].said),
        )


STARTED_BY = {"+": "a recipe with `+`", "no +": "a recipe without `+`"}


def their_slots() -> None:
    """Print what we make of the slots of the tools."""
    head("Server", "Style", "We are started by", "Width", "Slots back", "We say")
    for case in interop.join_cases():
        with tempfile.TemporaryDirectory() as name:
            said, seen = interop.join(case, Path(name))
        refusal = "" if said[0].isdigit() else f"`{said[0]}`"
        row(
            case.server,
            case.style,
            STARTED_BY.get(case.how, case.how),
            "none" if refusal else f"{seen.width} of {interop.SLOTS}",
            f"{seen.back} of {interop.SLOTS}",
            refusal,
        )


def serve(case: interop.Case) -> interop.Seen:
    """What a tool does, in a directory of its own."""
    with tempfile.TemporaryDirectory() as name:
        directory, gate = Path(name, "work"), Path(name, "gate")
        directory.mkdir()
        gate.mkdir()
        return interop.serve(case, directory, Gate(gate), SETTLE)


def outcome(case: interop.Case, seen: interop.Seen) -> str:
    """How many commands ran at once, in words."""
    if seen.status:
        return f"fails, status {seen.status}"
    if interop.understands(case):
        return f"{seen.width} of {interop.SLOTS}"
    return f"takes no part ({seen.width})"


def remark(text: str) -> str:
    """The first line of what a tool has said, without the numbers of this run."""
    line = text.strip().splitlines()[0].replace("|", "\\|").replace("`", "'")
    line = re.sub(r"/proc/[^ ]*[0-9]", "PATH", re.sub(r" \[.*", "", line))
    return f"`{line}`"


def head(*cells: str) -> None:
    """Print the first rows of a table."""
    print()
    row(*cells)
    print("|" + "---|" * len(cells))


def row(*cells: str) -> None:
    """Print one row."""
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    our_slots()
    their_slots()
