# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What people and programs get to see: progress, the table, the JSON object."""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, final

from archive.measure import STAGES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from archive.foreman import Run
    from archive.report import Row

#: Problems of each kind that the table names; --json names all.
NAMED = 3

#: Seconds between two changes of the line on a terminal.
REFRESH = 0.1


@final
class Progress:
    """A line that changes on a terminal; elsewhere a line for every tenth of the files."""

    def __init__(self, stream: TextIO, label: str, total: int) -> None:
        self.stream = stream
        self.label = label
        self.total = total
        self.live = stream.isatty()
        self.start = time.monotonic()
        self.due = 0.0

    def __enter__(self) -> Progress:
        """Start."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave an empty line to what comes next."""
        if self.live:
            self.write("\r\x1b[K")

    def __call__(self, files: int) -> None:
        """Show how many files are done, if it is time to."""
        # What a killed job has done is done again, so more may be done than there is.
        percent = min(100, 100 * files // self.total) if self.total else 100
        seconds = time.monotonic() - self.start
        if (seconds if self.live else percent) < self.due:
            return
        line = f"{self.label}: {percent:3}% of {counted(self.total, 'file')}, {seconds:.1f} s"
        if self.live:
            self.due = seconds + REFRESH
            self.write(f"\r{line}\x1b[K")
        else:
            self.due = percent + 10 - percent % 10
            self.write(f"{line}\n")

    def write(self, text: str) -> None:
        """Put text out at once."""
        self.stream.write(text)
        self.stream.flush()


@dataclass(frozen=True)
class Result:
    """All that the program has found out."""

    root: Path
    context: str
    slots: int
    parallel: Run
    serial: Run | None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the serial run."""
        return self.serial.seconds / self.parallel.seconds if self.serial else None

    @property
    def same_hash(self) -> bool:
        """Whether both runs have seen the same tree."""
        return not self.serial or self.serial.report.digest == self.parallel.report.digest

    def relative(self, path: Path) -> str:
        """A path below the root."""
        return str(path.relative_to(self.root))


def stages(run: Run, slots: int) -> dict[str, float]:
    """Where the time of all slots went: the stages of the work, and what is left over.

    That is, starting and ending jobs, waiting for them, slots without work, and the work that was
    lost when jobs were killed.
    """
    seconds = {stage: run.report.seconds.get(stage, 0.0) for stage in (*STAGES, "folders")}
    return {**seconds, "rest": slots * run.seconds - sum(seconds.values())}


def as_json(result: Result) -> dict[str, Any]:
    """The object that --json prints; sizes in bytes, times in seconds."""
    run, serial, report = result.parallel, result.serial, result.parallel.report

    def rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
        return [{**row._asdict(), "path": result.relative(row.path)} for row in rows]

    return {
        "path": str(result.root),
        "root_hash": report.digest.hex(),
        "serial_root_hash": serial.report.digest.hex() if serial else None,
        "files": report.files,
        "folders": report.folders,
        "size": report.size,
        "packed": report.packed,
        "tokens": report.tokens,
        "lines": report.lines,
        "functions": report.functions,
        "python": platform.python_version(),
        "context": result.context,
        "slots": result.slots,
        "jobs": run.jobs,
        "peak_running": run.peak_running,
        "killed": run.killed,
        "retried": run.retried,
        "seconds": run.seconds,
        "serial_seconds": serial.seconds if serial else None,
        "speedup": result.speedup,
        "stages": stages(run, result.slots),
        "serial_stages": stages(serial, 1) if serial else None,
        "largest": rows(report.largest),
        "slowest": rows(report.slowest),
        "best_compressed": rows(report.best),
        "problems": [
            {**problem._asdict(), "path": result.relative(problem.path)}
            for problem in report.problems
        ],
    }


def as_table(result: Result) -> Iterator[str]:
    """The lines of the report for people."""
    run, report = result.parallel, result.parallel.report
    yield f"Archive report of {printable(str(result.root))}"
    yield (
        f"{counted(report.files, 'file')} in {counted(report.folders, 'folder')}: "
        f"{counted(report.lines, 'line')}, {counted(report.functions, 'function')}, "
        f"{counted(report.tokens, 'token')}"
    )
    share = f" ({report.packed / report.size:.1%})" if report.size else ""
    yield f"{counted(report.size, 'byte')}, compressed to {report.packed:,}{share}"
    yield f"root hash {report.digest.hex()}"
    for title, rows in (
        ("largest", report.largest),
        ("slowest", report.slowest),
        ("best compressed", report.best),
    ):
        yield ""
        yield f"{title:40}{'bytes':>12}{'packed':>12}{'lines':>8}{'functions':>11}{'ms':>9}"
        for row in rows:
            yield (
                f"  {shortened(printable(result.relative(row.path)), 36):38}{row.size:12,}"
                f"{row.packed / row.size if row.size else 1:12.1%}{row.lines:8,}"
                f"{row.functions:11,}{1000 * row.seconds:9,.1f}"
            )
    yield ""
    yield from problem_lines(result)
    yield ""
    yield (
        f"{counted(run.jobs, 'job')} in {counted(result.slots, 'slot')} ({result.context}), "
        f"at most {run.peak_running} running at once"
    )
    if run.killed:
        # What is not, its folder's job was killed as well: it is done again with the folder.
        yield f"{counted(run.killed, 'job')} killed, {run.retried:,} submitted again"
    yield from time_lines(result)


def problem_lines(result: Result) -> Iterator[str]:
    """How many problems of each kind there are, and the first of them."""
    problems = result.parallel.report.problems
    if not problems:
        yield "no problems"
    for kind, count in sorted(Counter(problem.kind for problem in problems).items()):
        yield f"{kind}: {count:,}"
        some = [problem for problem in problems if problem.kind == kind][:NAMED]
        for problem in some:
            yield f"  {printable(result.relative(problem.path))}: {printable(problem.detail)}"
        if count > len(some):
            yield f"  and {count - len(some):,} more"


def time_lines(result: Result) -> Iterator[str]:
    """Where the time went, in all slots together and in the serial run."""
    columns = [("all slots", result.parallel, stages(result.parallel, result.slots))]
    if result.serial:
        columns.append(("serial", result.serial, stages(result.serial, 1)))
    yield ""
    yield f"{'where the time went, in seconds':40}" + "".join(f"{c[0]:>12}" for c in columns)
    for stage in columns[0][2]:
        name = "all else: starting jobs, idle slots" if stage == "rest" else stage
        yield f"  {name:38}" + "".join(f"{c[2][stage]:12.2f}" for c in columns)
    yield f"{'wall time':40}" + "".join(f"{c[1].seconds:12.2f}" for c in columns)
    if result.serial:
        verdict = "with the same root hash" if result.same_hash else "WITH ANOTHER ROOT HASH"
        yield f"{result.speedup:.2f} times as fast as the serial run, {verdict}"


def counted(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def shortened(text: str, width: int) -> str:
    """The end of a text that is too long."""
    return text if len(text) <= width else "..." + text[3 - width :]


def printable(text: str) -> str:
    """Text that stays on its line: what is odd in a name is shown escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )
