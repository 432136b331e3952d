# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Where the time of one job goes: CPU, page faults and system calls, in each process.

Every figure is a difference between two runs that differ in nothing but the number of jobs, so
what starting and ending cost is not in it. System calls are counted by strace in runs of their own,
since tracing changes all that is timed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from .driver import command_of, understood
from .envs import Environment, clean
from .results import spread
from .systems import SYSTEMS
from .tables import number, table

PR_SET_CHILD_SUBREAPER = 36
_CALL = re.compile(r"(\w+)\((.*)")
_THREAD = re.compile(r"^clone3?\(.*CLONE_THREAD.*= (\d+)$")
_SERVER = re.compile(r"^execve\(.*(_zygote|forkserver)", re.MULTILINE)
#: Rarer system calls are not worth a line.
_RARE = 0.05

SUBMITTER, ZYGOTE, WORKERS = "submitter", "zygote", "workers"


class Kind(NamedTuple):
    """One way to run jobs, and how many of them tell what one costs."""

    system: str
    few: int
    many: int
    together: bool = False

    @property
    def title(self) -> str:
        """Its name in the tables."""
        how = ", all at once" if self.together else ""
        return SYSTEMS[self.system].title + how


KINDS = [
    Kind("floor-fork", 100, 600),
    Kind("floor-job", 100, 600),
    Kind("floor-promises", 100, 600),
    Kind("ours-fork", 100, 600),
    Kind("process-fork", 100, 600),
    Kind("ours-fork", 100, 600, together=True),
    Kind("pool-fresh-fork", 100, 600, together=True),
    Kind("peer-fork", 100, 600, together=True),
    Kind("floor-zygote", 100, 600),
    Kind("ours-forkserver", 100, 600),
    Kind("process-forkserver", 10, 60),
    Kind("ours-spawn", 5, 25),
    Kind("floor-pipes", 500, 5_500),
    Kind("ours-warm-fork", 500, 5_500),
    Kind("ppe-fork", 500, 5_500),
    Kind("ours-warm-fork", 500, 5_500, together=True),
    Kind("ours-executor-fork", 500, 5_500, together=True),
    Kind("ppe-fork", 500, 5_500, together=True),
    Kind("ours-map-1", 500, 20_500, together=True),
    Kind("ours-map-auto", 20_000, 220_000, together=True),
    Kind("pool-imap-1", 500, 20_500, together=True),
]


class Spent(NamedTuple):
    """What one run took: microseconds and page faults, of the submitter and of all others."""

    wall: float
    own_user: float
    own_system: float
    own_faults: float
    user: float
    system: float
    faults: float

    def less(self, other: Spent, jobs: int) -> Spent:
        """What one of so many more jobs took."""
        return Spent(*((mine - theirs) / jobs for mine, theirs in zip(self, other)))


def examine(kinds: list[Kind], environments: Mapping[str, Environment], rounds: int) -> str:
    """Run these kinds, so many times in turn; the report."""
    found: dict[Kind, list[Spent]] = {kind: [] for kind in kinds}
    calls: dict[Kind, dict[str, Counter[str]]] = {}
    for number_ in range(rounds):
        for kind in kinds:
            spent = [_spend(kind, environments, jobs) for jobs in (kind.few, kind.many)]
            found[kind].append(spent[1].less(spent[0], kind.many - kind.few))
            print(f"{number_ + 1}/{rounds} {kind.title}", file=sys.stderr, flush=True)
    if shutil.which("strace"):
        for kind in kinds:
            calls[kind] = _calls_per_job(kind, environments)
            print(f"traced {kind.title}", file=sys.stderr, flush=True)
    return report(found, calls)


def _spend(kind: Kind, environments: Mapping[str, Environment], jobs: int) -> Spent:
    """Run so many jobs, and wait for every process that has come of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with _reaping():
        said = _run(kind, environments, jobs, [])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = [said[key] for key in ("user_us", "system_us", "faults")]
    everybody = [
        (after.ru_utime - before.ru_utime) * 1e6,
        (after.ru_stime - before.ru_stime) * 1e6,
        after.ru_minflt - before.ru_minflt,
    ]
    return Spent(said["wall_us"], *own, *(all_ - mine for all_, mine in zip(everybody, own)))


@contextlib.contextmanager
def _reaping() -> Iterator[None]:
    """Inherit the orphans, such as a zygote, and wait for them, so that they are counted."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _run(
    kind: Kind, environments: Mapping[str, Environment], jobs: int, prefix: list[str]
) -> dict[str, Any]:
    system = SYSTEMS[kind.system]
    environment = environments[system.environment]
    if environment.trouble:
        raise RuntimeError(f"{kind.title}: {environment.trouble}")
    slots = 2 if kind.together else 1
    parameters = {"count": jobs, "together": kind.together, "slots": slots}
    done = subprocess.run(
        [*prefix, *command_of(system, environment, "trips", parameters)],
        env=clean(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = understood(done.stdout, done.stderr, done.returncode)
    if "wall_us" not in found:
        raise RuntimeError(f"{kind.title}: {found}")
    return found


def _calls_per_job(kind: Kind, environments: Mapping[str, Environment]) -> dict[str, Counter[str]]:
    few, many = kind.few, min(kind.many, kind.few * 3)
    counted = []
    for jobs in (few, many):
        with tempfile.TemporaryDirectory() as directory:
            prefix = ["strace", "-f", "-ff", "-qq", "-s", "400", "-o", f"{directory}/t"]
            pid = int(_run(kind, environments, jobs, prefix)["pid"])
            counted.append(count_calls(Path(directory), pid))
    found: dict[str, Counter[str]] = {}
    for role in (SUBMITTER, ZYGOTE, WORKERS):
        per_job: Any = Counter()
        for name, count in counted[1][role].items():
            per_job[name] = (count - counted[0][role][name]) / (many - few)
        found[role] = per_job
    return found


def count_calls(directory: Path, submitter: int) -> dict[str, Counter[str]]:
    """Count the system calls in strace's files, one for each thread, by who made them."""
    files = {int(path.suffix[1:]): path.read_text(errors="replace") for path in directory.iterdir()}
    process_of: dict[int, int] = {}
    for thread, text in files.items():
        for line in text.splitlines():
            match = _THREAD.match(line)
            if match is not None:
                process_of[int(match[1])] = thread
    found: dict[str, Counter[str]] = {role: Counter() for role in (SUBMITTER, ZYGOTE, WORKERS)}
    for thread, text in files.items():
        process = thread
        while process in process_of:
            process = process_of[process]
        role = SUBMITTER if process == submitter else WORKERS
        if role == WORKERS and _SERVER.search(text):
            role = ZYGOTE
        calls = (_CALL.match(line) for line in text.splitlines())
        found[role].update(call[1] for call in calls if call is not None)
    return found


def report(
    found: Mapping[Kind, list[Spent]], calls: Mapping[Kind, Mapping[str, Counter[str]]]
) -> str:
    """Write two kinds of tables: what a job costs, and which system calls it makes."""
    lines = []
    for kind, spent in found.items():
        medians = Spent(*(_median(values) for values in zip(*spent)))
        total = [sum(counts.values()) for counts in _counts(calls.get(kind))]
        lines.append(
            [
                kind.title,
                number(medians.wall, 1),
                f"{number(medians.own_user, 1)} + {number(medians.own_system, 1)}",
                f"{number(medians.user, 1)} + {number(medians.system, 1)}",
                f"{number(medians.own_faults, 1)} / {number(medians.faults, 1)}",
                " / ".join(number(count, 1) for count in total),
            ]
        )
    head = ["one job", "wall, µs", "submitter's CPU, user + system, µs", "the others'"]
    head += ["page faults, submitter / others", "system calls, submitter / others"]
    parts = [table(head, lines)]
    for kind, roles in calls.items():
        words = [f"{role}: {text}" for role, counts in roles.items() if (text := _listed(counts))]
        if words:
            parts.append(f"- {kind.title}. " + "; ".join(words) + ".")
    if parts[1:]:
        parts.insert(1, "System calls for each job:\n")
    return "\n".join(parts) + "\n"


def _counts(roles: Optional[Mapping[str, Counter[str]]]) -> list[Counter[str]]:
    if roles is None:
        return []
    return [roles[SUBMITTER], roles[ZYGOTE] + roles[WORKERS]]


def _listed(counts: Counter[str]) -> str:
    common = [(name, count) for name, count in counts.most_common() if count >= _RARE]
    return ", ".join(
        f"`{name}`" if round(count, 1) == 1 else f"{number(count, 1)} `{name}`"
        for name, count in common
    )


def _median(values: tuple[float, ...]) -> float:
    found = spread(list(values))
    assert found is not None  # there is at least one round
    return max(found.median, 0.0)
