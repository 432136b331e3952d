# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Tables of the results, in Markdown, and their place in the documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from .results import Record, Results, Spread
from .rows import Group, Metric, row_id
from .targets import all_bounds, all_targets

#: Between these a page has what is written by ``--publish``, and ``--anatomy --publish``.
BEGIN = "<!-- begin: written by benchmarks/run.py --publish -->"
END = "<!-- end: written by benchmarks/run.py --publish -->"
ANATOMY = (BEGIN.replace("--publish", "--anatomy"), END.replace("--publish", "--anatomy"))


def number(value: float, digits: int) -> str:
    """Write a number; a small one with as many digits as it takes to tell it from others."""
    if value and abs(value) < 10 and not digits:
        digits = 1 if abs(value) >= 1 else 2
    return f"{value:,.{digits}f}"


def cell(spread: Optional[Spread], digits: int) -> str:
    """Write a median, and the quartiles if there are any."""
    if spread is None:
        return ""
    median = number(spread.median, digits)
    if spread.number < 2 or math.isnan(spread.low):
        return median
    low, high = number(spread.low, digits), number(spread.high, digits)
    return median if low == median == high else f"{median} ({low} to {high})"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Write a table: words to the left, numbers to the right."""
    rule = ["---"] + ["--:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)) + "\n"


def group_text(group: Group, results: Results) -> str:
    """Write all of a group that has been measured; nothing if that is nothing."""
    known = [row for row in group.rows if row.id in results.rows]
    if not known:
        return ""
    names = list(dict.fromkeys(row.name for row in known))
    titles = {row.name: row.system.title for row in known}
    shown = [name for name in names if any(measured(group, results, name))]
    parts = [f"### {group.title}\n", f"{group.text}\n"]
    if group.settings == [""]:
        lines = [
            [
                titles[name],
                *(value_of(results, row_id(group.key, name), one) for one in group.metrics),
            ]
            for name in shown
        ]
        parts.append(table(["", *(one.heading for one in group.metrics)], lines))
    else:
        for one in group.metrics if shown else ():
            lines = [
                [
                    titles[name],
                    *(
                        value_of(results, row_id(group.key, name, setting), one)
                        for setting in group.settings
                    ),
                ]
                for name in shown
            ]
            parts.append(table([one.heading, *group.settings], lines))
    troubles = trouble_lines(group, results)
    if troubles:
        parts.append("\n".join(troubles) + "\n")
    return "\n".join(parts)


def measured(group: Group, results: Results, name: str) -> list[Record]:
    """Return the records of a system in a group that have values."""
    records = (results.rows.get(row.id) for row in group.rows if row.name == name)
    return [record for record in records if record is not None and record.metrics]


def value_of(results: Results, row: str, metric: Metric) -> str:
    """Write what goes into one cell."""
    record = results.rows.get(row)
    return "" if record is None else cell(record.spread(metric.key), metric.digits)


def trouble_lines(group: Group, results: Results) -> list[str]:
    """Write which rows have no values, or not from every round, and why."""
    lines: dict[str, list[str]] = {}
    for row in group.rows:
        record = results.rows.get(row.id)
        if record is None:
            continue
        title = row.system.title + (f" ({row.setting})" if row.setting else "")
        if record.trouble:
            lines.setdefault(record.trouble, []).append(title)
        elif record.failures:
            lost = f"{len(record.failures)} of {len(record.rounds)} rounds failed"
            lines.setdefault(f"{lost}: {record.failures[0]}", []).append(title)
    return [f"- {'; '.join(titles)}: {why}." for why, titles in lines.items()]


def targets_text(results: Results) -> str:
    """Write what is to be reached, and what was."""
    lines = []
    for target in all_targets():
        reached = target.ratio(results)
        if reached is not None:
            said = "yes" if target.met(reached) else "no"
            most = target.most(results)
            there = cell(most, 2) if most else ""
            lines.append([target.text, target.wanted, cell(reached, 2), there, said])
    for bound in all_bounds():
        record = results.rows.get(bound.row)
        found = record and record.spread(bound.metric)
        if found:
            said = "yes" if found.median <= bound.most else "no"
            lines.append([bound.text, f"at most {bound.most:g}", cell(found, 2), "", said])
    if not lines:
        return ""
    text = (
        "Ratios are taken round by round: what ran in turn is compared. Between sessions there is"
        " only the ratio of the medians, without a spread. The limit is what the least comes to"
        " that could be called a job: see the rows with that name.\n"
    )
    head = ["ratio", "wanted", "reached", "the limit's", "met"]
    return f"### Targets\n\n{text}\n" + table(head, lines)


def sessions_text(results: Results) -> str:
    """Write when, where and with what it was measured."""
    parts = ["### Machine and versions\n"]
    for name, session in results.sessions.items():
        machine = ", ".join(f"{key} {value}" for key, value in session["machine"].items())
        commit = f", commit {session['commit']}" if session["commit"] else ""
        load = f"load {session['load_before']} before and {session['load_after']} after"
        parts.append(f"- {name}{commit}: {machine}; {load}.")
        versions: dict[str, str] = {}
        for found in session["versions"].values():
            versions.update({key: value for key, value in found.items() if key != "jobserver"})
        versions.pop("pip", None)
        own = session["versions"].get("ours", {}).get("jobserver")
        listed = [f"{key} {value}" for key, value in versions.items()]
        parts.append(f"  {', '.join(([f'jobserver {own}'] if own else []) + listed)}.")
    if results.brief:
        parts.append("\nPart of this is a smoke run, whose figures mean nothing.")
    return "\n".join(parts) + "\n"


def report(groups: Iterable[Group], results: Results) -> str:
    """Write everything."""
    parts = [targets_text(results), *(group_text(group, results) for group in groups)]
    return "\n".join([part for part in (*parts, sessions_text(results)) if part])


def insert(page: Path, text: str, marks: tuple[str, str] = (BEGIN, END)) -> None:
    """Put the text between the marks in a page, in the place of what is there.

    Raises:
        LookupError: The page does not have both marks, in this order.
    """
    before, begin, rest = page.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise LookupError(f"{page} lacks the marks that the tables go between")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")
