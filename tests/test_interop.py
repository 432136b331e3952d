# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Each tool in both roles and each style, as the page on builders says it in its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import interop
import pytest
from interop import SLOTS, Case

if TYPE_CHECKING:
    from helpers import Gate

# Make and ninja with our slots are test_run's and test_child_env's.
BUILD = [case for case in interop.build_cases() if case.tool.startswith(("cargo", "gcc"))]
REFUSED = [case for case in interop.build_cases() if not interop.understands(case)]


@pytest.mark.contract("K3", "K4", "K6", "N5")
@pytest.mark.parametrize("case", [case for case in BUILD if case not in REFUSED], ids=str)
def test_tool_on_our_slots(case: Case, tmp_path: Path, gate: Gate) -> None:
    """The tool runs as many commands as there are slots, and returns them all."""
    seen = interop.serve(case, tmp_path, gate)

    assert seen == (0, SLOTS, SLOTS, "")
    assert len(gate.entered()) == interop.MOST


@pytest.mark.contract("K4")
@pytest.mark.parametrize("case", [case for case in REFUSED if case.how == "run"], ids=str)
def test_tool_that_does_not_know_the_style(case: Case, tmp_path: Path, gate: Gate) -> None:
    """A tool that cannot read what it is offered leaves the slots alone."""
    gate.open()
    seen = interop.serve(case, tmp_path, gate)

    assert seen.back == SLOTS
    assert (seen.status == 0) is ("make" not in case.tool.lower()), seen.said


@pytest.mark.contract("J6", "K1", "K9")
@pytest.mark.parametrize("case", interop.join_cases(), ids=str)
def test_we_on_the_slots_of_a_tool(case: Case, tmp_path: Path) -> None:
    """We have as many slots as the tool was given, again and again, and return them all."""
    said, seen = interop.join(case, tmp_path)

    assert said == [interop.offers(case)] * 2, seen.said
    assert seen[::2] == (0, SLOTS), seen.said
    assert seen.said == ""


def test_the_page_has_them_all() -> None:
    """The table in the documentation says of each tool that is installed what the tests see."""
    page = (Path(__file__).resolve().parents[1] / "docs" / "interop.md").read_text()
    ours = page.partition("## We on slots")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ours.splitlines()]
    said = {tuple(row[:2]): row[2:] for row in rows if len(row) > 4}
    for case in interop.build_cases():
        if f"| {case.tool} |" in ours:  # other versions may do otherwise
            *widths, back, _ = said[case.tool, case.style]
            expected = [f"{SLOTS} of {SLOTS}"] * 2 if interop.understands(case) else widths
            assert (widths, back) == (expected, f"{SLOTS} of {SLOTS}")
            assert ("4 of 4" in widths) is interop.understands(case)
