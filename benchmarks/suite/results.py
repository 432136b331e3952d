# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What was found: every value of every round, kept as JSON, and what is made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

SCHEMA = 1
Found = dict[str, float]


class Spread(NamedTuple):
    """The median of a number of values, and the quartiles between which half of them lie."""

    median: float
    low: float
    high: float
    number: int


def spread(values: Iterable[float]) -> Optional[Spread]:
    """Return median and quartiles; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    if len(ordered) == 1:
        return Spread(ordered[0], ordered[0], ordered[0], 1)
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high, len(ordered))


@dataclass
class Record:
    """One row: what each round found, or why it found nothing."""

    session: str
    rounds: list[Optional[Found]] = field(default_factory=list)
    unavailable: str = ""
    failures: list[str] = field(default_factory=list)

    def values(self, metric: str) -> list[float]:
        """All values of a metric."""
        return [found[metric] for found in self.rounds if found and metric in found]

    def spread(self, metric: str) -> Optional[Spread]:
        """The median of a metric, and its spread."""
        return spread(self.values(metric))

    @property
    def metrics(self) -> list[str]:
        """The metrics that there are values of."""
        return list(dict.fromkeys(key for found in self.rounds if found for key in found))

    @property
    def trouble(self) -> str:
        """Why there are no values; nothing if there are."""
        if self.metrics:
            return ""
        if self.unavailable:
            return f"not available: {self.unavailable}"
        return f"failed: {self.failures[0]}" if self.failures else "not run"


@dataclass
class Results:
    """All rows, and the sessions in which they were measured."""

    sessions: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what an earlier session has left; nothing if there was none."""
        if not path.exists():
            return cls()
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            return cls()
        rows = {}
        for name, row in data["rows"].items():
            row.pop("summary")
            rows[name] = Record(**row)
        return cls(data["sessions"], rows)

    def save(self, path: Path) -> None:
        """Write everything, and forget the sessions of which no row is left."""
        used = {record.session for record in self.rows.values()}
        self.sessions = {name: told for name, told in self.sessions.items() if name in used}
        rows = {
            name: {**asdict(record), "summary": summary(record)}
            for name, record in self.rows.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"schema": SCHEMA, "sessions": self.sessions, "rows": rows}
        path.write_text(json.dumps(data, indent=1) + "\n")

    @property
    def brief(self) -> bool:
        """Whether some of it comes from a smoke run."""
        return any(session["quick"] for session in self.sessions.values())

    def ratio(self, above: tuple[str, str], below: tuple[str, str]) -> Optional[Spread]:
        """Divide one metric of one row by another: round by round, if they ran in turn."""
        first, second = self.rows.get(above[0]), self.rows.get(below[0])
        if first is None or second is None:
            return None
        if first.session == second.session:
            pairs = zip(first.rounds, second.rounds)
            return spread(
                one[above[1]] / two[below[1]]
                for one, two in pairs
                if one and two and above[1] in one and two.get(below[1])
            )
        ours, theirs = first.spread(above[1]), second.spread(below[1])
        if ours is None or theirs is None or not theirs.median:
            return None
        return Spread(ours.median / theirs.median, float("nan"), float("nan"), 1)


def summary(record: Record) -> dict[str, dict[str, float]]:
    """What a reader of the JSON looks for first."""
    spreads = {metric: record.spread(metric) for metric in record.metrics}
    return {metric: found._asdict() for metric, found in spreads.items() if found}
