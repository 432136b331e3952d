# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What is measured: every row of every table, and the program that measures it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from .systems import SYSTEMS, System

MB = 1_000_000


class Metric(NamedTuple):
    """A number that a measure reports, and how a table shows it."""

    key: str
    heading: str
    digits: int = 0


@dataclass(frozen=True)
class Row:
    """One measurement of one system."""

    group: str
    name: str
    system: System
    measure: str
    parameters: Mapping[str, Any]
    setting: str = ""
    #: What takes minutes runs in the first rounds only.
    rounds: int = 1_000

    @property
    def id(self) -> str:
        """The name that `--only` knows it by."""
        return row_id(self.group, self.name, self.setting)


def row_id(group: str, name: str, setting: str = "") -> str:
    """Return the name of a row: one word, without the comma that `--only` separates names by."""
    return "/".join(filter(None, (group, name, setting))).replace(" ", "-").replace(",", "")


@dataclass
class Group:
    """Rows that are compared with each other, and so are run in turn."""

    key: str
    title: str
    text: str
    metrics: list[Metric]
    rounds: int = 7
    limit: float = 120.0  # seconds for one run of one row
    rows: list[Row] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        """The columns of the tables, if there is more than one setting."""
        return list(dict.fromkeys(row.setting for row in self.rows))

    def add(
        self,
        measure: str,
        names: str,
        setting: str = "",
        *,
        at_most: int = Row.rounds,
        **parameters: Any,
    ) -> None:
        """Add a row for each of the systems named."""
        self.rows += [
            Row(self.key, name, SYSTEMS[name], measure, parameters, setting, at_most)
            for name in names.split()
        ]


RATES = [Metric("jobs_per_s", "jobs/s"), Metric("round_trip_us", "round trip, µs")]
FRESH = (
    "ours-fork ours-forkserver peer-fork peer-forkserver pool-fresh-fork"
    " process-fork process-forkserver"
)


def _noop() -> Group:
    group = Group(
        "noop",
        "Jobs that do nothing",
        "Two slots. Jobs a second in a crowd that is submitted (or mapped) all at once, and the"
        " time from the call to the result of one job alone.",
        RATES,
    )
    group.add(
        "crowd",
        "ours-fork ours-forkserver ours-spawn peer-fork peer-forkserver peer-executor-fork"
        " pool-fresh-fork process-fork process-forkserver"
        " ours-warm-fork ours-warm-forkserver ours-executor-fork ours-executor-forkserver"
        " ppe-fork ppe-forkserver pool-fork",
    )
    group.add("crowd", "ours-map-1 pool-imap-1 ppe-map-1 loky-map-1 mpire-map-1 pebble-map-1")
    group.add(
        "crowd",
        "ours-map-100 ours-map-auto ours-fork-map-1 ours-fork-map-100 ours-fork-map-auto"
        " ours-executor-map-1 ours-executor-map-100 ppe-map-100 pool-map-100"
        " loky-map-100 mpire-map-100 pebble-map-100 joblib",
        once=False,
    )
    group.add("crowd", "floor-fork floor-job floor-promises floor-zygote floor-pipes")
    return group


def _uneven() -> Group:
    group = Group(
        "uneven",
        "A map over uneven jobs",
        "Two slots; one job in fifty sleeps 100 ms, the others 1 ms.",
        [Metric("jobs_per_s", "jobs/s")],
    )
    group.add(
        "uneven", "ours-map-1 ours-map-100 ours-map-auto ours-fork-map-auto pool-imap-1 joblib"
    )
    return group


def _nested() -> Group:
    group = Group(
        "nested",
        "Launched from a job",
        "The same as above, but by a job. PyPI's jobserver and this one have three slots, of which"
        " the outer job holds one; the others are pools of two in a pool.",
        RATES,
    )
    group.add("nested", FRESH.replace("pool-fresh-fork ", "") + " ours-spawn")
    group.add("nested", "ours-warm-fork ours-warm-forkserver ppe-fork ppe-forkserver loky-map-1")
    return group


def _parent() -> Group:
    group = Group(
        "parent",
        "From a large program",
        "Jobs that do nothing, from a program that has so much memory in pieces of 4 kB, or that"
        " has imported 500 modules of about 200 lines. Crowds of one second; with so much memory of"
        " four, as a second is some forty jobs there.",
        RATES,
        rounds=5,
    )
    names = f"{FRESH} ours-warm-fork ours-warm-forkserver floor-fork floor-promises"
    group.add("crowd", names, "as it is")
    for megabytes, setting in ((256, "256 MB"), (1024, "1 GB")):
        group.add("crowd", names, setting, megabytes=megabytes, seconds=4.0)
    group.add("crowd", names, "500 modules", modules=500)
    return group


_LARGE = (
    "ours-fork ours-forkserver ours-warm-fork ours-executor-fork"
    " peer-fork ppe-fork pool-fork loky-map-1 joblib mpire-map-1 pebble-map-1"
)


def _large() -> Group:
    group = Group(
        "large",
        "Large data on its way",
        "One slot. From `submit` into the function, and from its return into the caller."
        " joblib hands arguments over in memory-mapped files, of which it writes one for an array,"
        " however often that is sent.",
        [Metric("ms", "ms", 1)],
        rounds=5,
    )
    few = "ours-fork ours-forkserver ours-warm-fork ppe-fork floor-copy"
    settings = (
        ("1 MB", "numpy", MB),
        ("64 MB", "numpy", 64 * MB),
        ("bytearray", "bytearray", 64 * MB),
    )
    for label, kind, size in settings:
        for direction in ("argument", "result"):
            data: Any = {"kind": kind, "size": size, "direction": direction}
            setting = f"{label} {direction}"
            group.add("transfer", _LARGE + " floor-copy", setting, **data)
    for megabytes in (16, 256, 1_000):
        for direction in ("argument", "result"):
            data = {"kind": "numpy", "size": megabytes * MB, "direction": direction}
            group.add("transfer", few, f"{megabytes} MB {direction}", **data)
    return group


def _footprint() -> Group:
    group = Group(
        "footprint",
        "Memory that large data takes on its way",
        "The most that the caller and its worker have together, data included, as a multiple of"
        " the 64 MB sent; pages that they share count once.",
        [Metric("peak_of_data", "times the data", 2)],
        rounds=3,
    )
    for kind in ("numpy", "bytearray"):
        for direction in ("argument", "result"):
            data: Any = {"kind": kind, "size": 64 * MB, "direction": direction}
            group.add("footprint", _LARGE, f"{kind} {direction}", **data)
    return group


_COUNTS = (10, 100, 1_000, 10_000)


def rounds_of(count: int) -> int:
    """Return how often so many jobs are run: thousands of them are an average by themselves."""
    return 1 if count >= 10_000 else Row.rounds


def _done() -> Group:
    group = Group(
        "done",
        "Many Futures that are done",
        "Two slots; every Future is kept. What one job costs, with so many of them.",
        [Metric("us_per_job", "µs a job")],
        rounds=5,
        limit=300.0,
    )
    for count in _COUNTS:
        group.add(
            "many_done",
            "ours-fork ours-forkserver ours-warm-fork ours-executor-fork peer-fork ppe-fork",
            f"{count:,}",
            at_most=rounds_of(count),
            count=count,
        )
    return group


def _flight() -> Group:
    group = Group(
        "flight",
        "Many jobs in flight",
        "No job ends before all are submitted. A Jobserver has a slot for each of them, so that"
        " many processes; an executor has two workers, and the others wait in it.",
        [Metric("us_per_submit", "µs a submit"), Metric("us_per_result", "µs a result")],
        rounds=3,
        limit=900.0,
    )
    for count in _COUNTS:
        label = f"{count:,}"
        most = rounds_of(count)
        names = "ours-fork ours-forkserver ours-warm-fork peer-fork"
        group.add("many_in_flight", names, label, at_most=most, count=count)
        names = "ours-executor-fork ppe-fork"
        group.add("many_in_flight", names, label, at_most=most, count=count, slots=2)
    return group


def _slots() -> Group:
    group = Group(
        "slots",
        "Slots from 1 to 512",
        "Jobs that sleep for 50 ms, four for each slot (of more than 64, two): with so many slots,"
        " jobs a second, and how much of what the slots would do if nothing else took time.",
        [Metric("jobs_per_s", "jobs/s"), Metric("of_ideal", "of the ideal", 2)],
        rounds=3,
        limit=120.0,
    )
    for slots in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        group.add(
            "sleepers",
            "ours-fork ours-forkserver ours-warm-fork ours-executor-fork"
            " peer-fork ppe-fork pool-fork",
            str(slots),
            slots=slots,
            each=4 if slots <= 64 else 2,
        )
    return group


def _start() -> Group:
    group = Group(
        "start",
        "Imports",
        "In an interpreter that has just started, byte code cached.",
        [Metric("us", "µs")],
        rounds=5,
    )
    group.add("operation", "ours-import ours-import-executor futures-import")
    return group


def _single() -> Group:
    group = Group("single", "Single operations", "In a loop.", [Metric("us", "µs", 2)], rounds=3)
    group.add("operation", "ours-slot ours-frame ours-channel")
    return group


def _idle() -> Group:
    parts = (("rss", "resident"), ("pss", "its share"), ("private", "its own"))
    group = Group(
        "idle",
        "Memory of idle workers, and of the process that forks them",
        "In MB: all that is resident, of which pages that are shared with others count in part"
        " (its share) or not at all (its own).",
        [
            Metric(f"{who}_{key}_mb", f"{who}, {what}", 1)
            for who in ("worker", "server")
            for key, what in parts
        ],
        rounds=3,
    )
    group.add("idle_memory", "ours-warm-fork ours-executor-fork ppe-fork pool-fork loky-map-1")
    names = "ours-forkserver ours-warm-forkserver ours-executor-forkserver ppe-forkserver"
    group.add("idle_memory", names, server=True)
    return group


def all_groups() -> list[Group]:
    """Everything that is measured, in the order of the tables."""
    makers = (_noop, _uneven, _nested, _parent, _large, _footprint, _done, _flight, _slots, _start)
    return [make() for make in (*makers, _single, _idle)]


def select(groups: Iterable[Group], wanted: Iterable[str]) -> list[Group]:
    """Keep the rows whose id, group, or system is among those wanted (`*` stands for anything).

    Raises:
        LookupError: Something wanted names no row.
    """
    patterns = list(wanted)
    unused = set(patterns)
    groups = list(groups)
    for group in groups:
        kept = []
        for row in group.rows:
            names = (row.id, row.group, row.name, f"{row.group}/{row.name}")
            hits = {one for one in patterns if any(fnmatchcase(name, one) for name in names)}
            unused -= hits
            if hits:
                kept.append(row)
        group.rows = kept
    if unused:
        raise LookupError(f"no such row: {', '.join(sorted(unused))}")
    return [group for group in groups if group.rows]


#: What a smoke run cuts the parameters of all rows down to.
BRIEF: dict[str, Any] = {
    "seconds": 0.02,
    "megabytes": 16,
    "modules": 20,
    "size": MB,
    "count": 20,
    "slots": 4,
    "items": 20,
}
#: What they are where a row does not say.
BRIEF_DEFAULTS: dict[str, dict[str, Any]] = {
    "crowd": {"seconds": BRIEF["seconds"]},
    "nested": {"seconds": BRIEF["seconds"]},
    "transfer": {"seconds": BRIEF["seconds"]},
    "uneven": {"items": BRIEF["items"]},
    "operation": {"seconds": BRIEF["seconds"]},
}


def brief(row: Row) -> dict[str, Any]:
    """Return the parameters of a row in a smoke run."""
    parameters = {**BRIEF_DEFAULTS.get(row.measure, {}), **row.parameters}
    return {
        key: min(value, BRIEF[key]) if key in BRIEF else value for key, value in parameters.items()
    }


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Leave out of a smoke run what its parameters make the same as another row."""
    kept: dict[tuple[str, str], Row] = {}
    for row in rows:
        kept.setdefault((row.name, repr(brief(row))), row)
    return list(kept.values())
