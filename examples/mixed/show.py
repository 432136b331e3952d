# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What people and programs get to see: progress, the table, the JSON object."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any, TextIO, final

from mixed.parts import PARTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mixed.foreman import Run

#: Seconds between two changes of the line on a terminal.
REFRESH = 0.1

TOTAL = sum(len(part.files) for part in PARTS)


@final
class Progress:
    """A line that changes on a terminal; elsewhere a line for every quarter of the objects."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
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

    def __call__(self, objects: int) -> None:
        """Show how many objects are done, if it is time to."""
        percent = 100 * objects // TOTAL
        seconds = time.monotonic() - self.start
        if (seconds if self.live else percent) < self.due:
            return
        line = f"building: {objects:2} of {TOTAL} objects, {seconds:.1f} s"
        if self.live:
            self.due = seconds + REFRESH
            self.write(f"\r{line}\x1b[K")
        else:
            self.due = percent + 25 - percent % 25
            self.write(f"{line}\n")

    def write(self, text: str) -> None:
        """Put text out at once."""
        self.stream.write(text)
        self.stream.flush()


def verdict(run: Run) -> str:
    """What is wrong with how it went; nothing if nothing is."""
    if run.slots is not None and run.peak > run.slots:
        return f"MORE COMPILERS THAN SLOTS: {run.peak}"
    if not run.outer and run.free != run.slots:
        return f"TOKENS MISSING: {run.free} of {run.slots} are free"
    return ""


def as_json(run: Run) -> dict[str, Any]:
    """The object that --json prints; sizes in bytes, times in seconds."""
    outcome = run.outcome
    return {
        "python": platform.python_version(),
        "context": run.context,
        "slots": run.slots,
        "pool": "outer" if run.outer else "own",
        "tokens_free": run.free,
        "seconds": run.seconds,
        "looks": run.looks,
        "peak_compilers": run.peak,
        "parts": {
            built.part.name: {
                "sdist": built.part.sdist,
                "how": built.how,
                "objects": built.objects,
                "attempts": built.attempts,
                "seconds": built.seconds,
                "peak_compilers": run.peaks[built.part.name],
            }
            for built in outcome.built
        },
        "killed": run.killed and {**run.killed._asdict(), "peak_after": run.peak_after},
        "symbols": outcome.symbols,
        "artefacts": {
            one.name: {"size": one.size, "sha256": one.sha256} for one in outcome.artefacts
        },
        "zip": {"size": outcome.zip.size, "sha256": outcome.zip.sha256},
    }


def as_table(run: Run) -> Iterator[str]:
    """The lines of the report for people."""
    outcome = run.outcome
    yield f"{'library':20}{'built by':20}" + "".join(
        f"{title:>11}" for title in ("objects", "attempts", "seconds", "compilers")
    )
    for built in outcome.built:
        yield (
            f"  {built.part.sdist:18}{built.how:20}{built.objects:11}{built.attempts:11}"
            f"{built.seconds:11.2f}{run.peaks[built.part.name]:11}"
        )
    yield ""
    yield f"{'artefact':20}{'bytes':>10}  {'symbols':>8}  sha256"
    for one in outcome.artefacts:
        symbols = str(outcome.symbols.get(one.name, ""))
        yield f"  {one.name:18}{one.size:10,}  {symbols:>8}  {one.sha256}"
    yield f"  {outcome.zip.name:18}{outcome.zip.size:10,}  {'':8}  {outcome.zip.sha256}"
    yield ""
    if run.killed:
        yield (
            f"make killed with {counted(run.killed.objects, 'object')} done and"
            f" {counted(run.killed.compilers, 'compiler')} at work;"
            f" afterwards at most {run.peak_after} at once"
        )
    yield f"at most {counted(run.peak, 'compiler')} at once, in {run.looks:,} looks at /proc"
    slots = "its slots" if run.slots is None else counted(run.slots, "slot")
    yield (
        f"{slots} {'of an outer make' if run.outer else 'of its own'} ({run.context}),"
        f" {counted(run.free, 'token')} free at the end"
    )
    yield f"wall time {run.seconds:.2f} s"
    if verdict(run):
        yield verdict(run)


def counted(number: int, thing: str) -> str:
    """A number of things."""
    return f"{number:,} {thing}{'s' * (number != 1)}"
