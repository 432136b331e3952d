# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What the project wants to reach, each as a ratio between two rows of one session."""

from __future__ import annotations

from typing import NamedTuple, Optional

from .results import Results, Spread

#: What counts as level with another: runs of the very same differ by as much.
LEVEL = 0.95


class Target(NamedTuple):
    """
    One row's metric over another's, and the bound that it is to keep.

    ``limit`` is the metric, in place of ours, of what nobody who does this from Python can beat.
    """

    text: str
    above: str
    below: str
    bound: float
    at_most: bool = False
    limit: Optional[str] = None

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return f"{'at most' if self.at_most else 'at least'} {self.bound:g}"

    def ratio(self, results: Results) -> Optional[Spread]:
        """What was reached."""
        return results.ratio(_split(self.above), _split(self.below))

    def most(self, results: Results) -> Optional[Spread]:
        """What there is to be reached, if that is known."""
        if self.limit is None:
            return None
        return results.ratio(_split(self.limit), _split(self.below))

    def met(self, reached: Spread) -> bool:
        """Whether that is enough."""
        return reached.median <= self.bound if self.at_most else reached.median >= self.bound


def _split(where: str) -> tuple[str, str]:
    row, _, metric = where.rpartition(":")
    return row, metric


def _fresh(place: str, row: str) -> list[Target]:
    """Return what fresh processes are to reach, wherever they are launched from."""
    pairs = [
        ("fork", "peer-fork", "PyPI's jobserver", 2.0, "floor-promises"),
        ("fork", "pool-fresh-fork", "`Pool(maxtasksperchild=1)`", 2.0, "floor-promises"),
        ("forkserver", "peer-forkserver", "PyPI's jobserver", 30.0, "floor-zygote"),
        ("forkserver", "process-forkserver", "`multiprocessing.Process`", 5.0, "floor-zygote"),
    ]
    metric = f"{row}:jobs_per_s".format
    return [
        Target(
            f"{method}{place}, jobs/s over {peer}",
            metric(f"ours-{method}"),
            metric(system),
            bound,
            limit=metric(floor),
        )
        for method, system, peer, bound, floor in pairs
    ]


def all_targets() -> list[Target]:
    """Everything that is to be reached."""
    noop = "noop/{}:jobs_per_s".format
    trip = "noop/{}:round_trip_us".format
    found = [
        *_fresh("", "noop/{}"),
        *_fresh(" from 1 GB", "parent/{}/1-GB"),
        *_fresh(" from 500 modules", "parent/{}/500-modules"),
        *[one for one in _fresh(" from a job", "nested/{}") if "pool" not in one.below],
    ]
    warm = noop("ours-warm-fork")
    found += [
        Target(
            "warm, jobs/s over `ProcessPoolExecutor`",
            warm,
            noop("ppe-fork"),
            3.0,
            limit=noop("floor-pipes"),
        ),
        Target("warm, jobs/s over loky", warm, noop("loky-map-1"), 1.0),
        Target("warm, jobs/s over mpire", warm, noop("mpire-map-1"), 1.0),
        Target("warm, jobs/s over Pebble", warm, noop("pebble-map-1"), 1.0),
        Target(
            "warm, round trip over `ProcessPoolExecutor`'s",
            trip("ours-warm-fork"),
            trip("ppe-fork"),
            0.6,
            at_most=True,
            limit=trip("floor-pipes"),
        ),
        Target(
            "warm `map`, chunksize 1, over `Pool.imap`",
            noop("ours-map-1"),
            noop("pool-imap-1"),
            LEVEL,
        ),
        Target(
            "executor, submit, over `ProcessPoolExecutor`",
            noop("ours-executor-fork"),
            noop("ppe-fork"),
            1.5,
        ),
    ]
    auto = noop("ours-map-auto")
    found += [
        Target('`map`, "auto", over joblib', auto, noop("joblib"), LEVEL),
        Target('`map`, "auto", over `ProcessPoolExecutor`, 100', auto, noop("ppe-map-100"), LEVEL),
        Target('`map`, "auto", over `Pool.map`, 100', auto, noop("pool-map-100"), LEVEL),
        Target(
            '`map`, "auto", over chunksize 1, uneven jobs',
            "uneven/ours-map-auto:jobs_per_s",
            "uneven/ours-map-1:jobs_per_s",
            LEVEL,
        ),
    ]
    for way in ("argument", "result"):
        ours = f"large/ours-warm-fork/64-MB-{way}:ms"
        peer, copy = f"large/ppe-fork/64-MB-{way}:ms", f"large/floor-copy/64-MB-{way}:ms"
        found += [
            Target(f"64 MB {way}, `ProcessPoolExecutor`'s time over ours", peer, ours, 4.0),
            Target(f"64 MB {way}, our time over a copy's", ours, copy, 2.0, at_most=True),
        ]
    imports = ("start/ours-import:us", "start/futures-import:us")
    title = "`import jobserver` over `import concurrent.futures.process`"
    return [*found, Target(title, *imports, 1.3, at_most=True)]


class Bound(NamedTuple):
    """A metric of one row that is to stay below something."""

    text: str
    row: str
    metric: str
    most: float


def all_bounds() -> list[Bound]:
    """The memory that data may take on its way."""
    return [
        Bound(f"{kind} {way}, {name}: memory over the data", row, "peak_of_data", 2.5)
        for name, system in (("fresh", "ours-fork"), ("warm", "ours-warm-fork"))
        for kind in ("numpy", "bytearray")
        for way in ("argument", "result")
        for row in (f"footprint/{system}/{kind}-{way}",)
    ]
