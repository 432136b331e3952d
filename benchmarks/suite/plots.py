# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Plots of the results, as PNG; they need matplotlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .results import Record, Results, Spread
from .rows import Group
from .tables import number

OURS = "#0b6e4f"
OTHERS = "#8a8f98"
LIMIT = "#c9a227"
MARKERS = "osv^Dx+*<>"

#: Which metric of which group is shown how, and in which file.
BARS = (("noop", "jobs_per_s"), ("noop", "round_trip_us"), ("nested", "jobs_per_s"))
SETTING_BARS = (("large", "ms", "64 MB result"), ("large", "ms", "64 MB argument"))
LINES = (
    ("parent", "round_trip_us", "resident memory of the program, MB"),
    ("done", "us_per_job", "Futures"),
    ("flight", "us_per_submit", "jobs in flight"),
    ("slots", "jobs_per_s", "slots"),
)
#: Where settings are no numbers.
PLACES = {"as it is": 16.0, "256 MB": 256.0, "1 GB": 1024.0}


def draw_all(groups: Iterable[Group], results: Results, directory: Path) -> list[Path]:
    """Draw what there are values for; the files made.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    found = {group.key: group for group in groups}
    made: list[Path] = []
    for key, metric in BARS:
        made += bars(found.get(key), results, metric, "", directory / f"{key}-{metric}.png")
    for key, metric, setting in SETTING_BARS:
        path = directory / f"{key}-{setting.replace(' ', '-')}.png"
        made += bars(found.get(key), results, metric, setting, path)
    for key, metric, label in LINES:
        made += lines(found.get(key), results, metric, label, directory / f"{key}.png")
    return made


def bars(
    group: Group | None, results: Results, metric: str, setting: str, path: Path
) -> list[Path]:
    """Draw a bar for each system, the best above; a logarithmic scale, as they lie far apart."""
    records = recorded(group, results, metric, setting)
    if group is None or not records:
        return []
    found = {name: spread_of(record, metric) for name, record in records.items()}
    names = sorted(found, key=lambda name: found[name].median, reverse=metric != "jobs_per_s")
    spreads = [found[name] for name in names]
    medians = [one.median for one in spreads]
    titles = {row.name: plain(row.system.title) for row in group.rows}
    with figure(0.24 * len(names) + 1.0, path) as axes:
        errors = [
            [one.median - one.low for one in spreads],
            [one.high - one.median for one in spreads],
        ]
        axes.barh(
            [titles[name] for name in names],
            medians,
            xerr=errors,
            color=[color(name) for name in names],
            error_kw={"elinewidth": 1},
        )
        axes.set_xscale("log")
        axes.margins(y=0.01)
        # The shortest bar is to be seen, and the number beside the longest one.
        axes.set_xlim(min(medians) / 3, max(medians) * 4)
        for place, spread in enumerate(spreads):
            axes.annotate(
                f" {number(spread.median, 0)}",
                (spread.high, place),
                va="center",
                fontsize=7,
            )
        axes.set_xlabel(heading(group, metric))
        axes.set_title(f"{group.title}{f': {setting}' if setting else ''}")
    return [path]


def lines(group: Group | None, results: Results, metric: str, label: str, path: Path) -> list[Path]:
    """Draw a line for each system, over the settings that are numbers."""
    if group is None:
        return []
    drawn = 0
    with figure(4.5, path) as axes:
        for name in dict.fromkeys(row.name for row in group.rows):
            points = []
            for row in group.rows:
                record = results.rows.get(row.id)
                place = place_of(row.setting)
                if row.name == name and place and record and record.values(metric):
                    points.append((place, spread_of(record, metric).median))
            if points:
                title = plain(next(row.system.title for row in group.rows if row.name == name))
                style = {"lw": 2.0} if name.startswith("ours") else {"lw": 1.0, "ls": "--"}
                axes.plot(*zip(*points), marker=MARKERS[drawn % 10], ms=4, label=title, **style)
                drawn += 1
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, alpha=0.3)
        axes.set_xlabel(label)
        axes.set_ylabel(heading(group, metric))
        axes.set_title(group.title)
        if drawn:
            axes.legend(fontsize=7)
    if not drawn:
        path.unlink()
        return []
    return [path]


@contextlib.contextmanager
def figure(height: float, path: Path) -> Any:
    """Give axes to draw on, then write the file."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawing, axes = plt.subplots(figsize=(8, height), layout="constrained")
    try:
        yield axes
        # Without the version of matplotlib in it, the same values give the same file.
        drawing.savefig(path, dpi=100, metadata={"Software": None})
    finally:
        plt.close(drawing)


def recorded(group: Group | None, results: Results, metric: str, setting: str) -> dict[str, Record]:
    """Return the records of a group that have values of the metric, by system."""
    return {
        row.name: results.rows[row.id]
        for row in (group.rows if group else ())
        if row.setting == setting and row.id in results.rows and results.rows[row.id].values(metric)
    }


def spread_of(record: Record, metric: str) -> Spread:
    """Return the spread of what is known to have values."""
    found = record.spread(metric)
    assert found is not None
    return found


def heading(group: Group, metric: str) -> str:
    """Return how the tables call a metric."""
    return next(one.heading for one in group.metrics if one.key == metric)


def plain(title: str) -> str:
    """Return a title without the marks of Markdown."""
    return title.replace("*", "").replace("`", "")


def color(name: str) -> str:
    """Return the color of a system: ours, another, or a limit."""
    return OURS if name.startswith("ours") else LIMIT if name.startswith("floor") else OTHERS


def place_of(setting: str) -> float:
    """Return where on the axis a setting is; 0 if nowhere."""
    text = setting.replace(",", "")
    return float(text) if text.isdigit() else PLACES.get(setting, 0.0)
