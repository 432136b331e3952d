# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What the jobs write down about themselves: when they run, wait and end, and which are killed.

All jobs append to one file, which is in memory and bears no name. A record is one write in append
mode, so records never mix, and what a job has written stays when the job is killed. The time is
CLOCK_MONOTONIC, which is the same in all processes.
"""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

#: The job works, and so holds a slot. Its first mark.
RUNNING = b"r"
#: The job is inside `submit` or `result`, where it may have lent its slot.
WAITING = b"w"
#: Last marks, of a folder job and of a file job.
FOLDER_ENDED = b"e"
FILE_ENDED = b"f"
#: What others note about a job: it is about to be sent SIGKILL, was found dead, is tried again.
SHOT = b"s"
DEAD = b"d"
AGAIN = b"a"


class Badge(NamedTuple):
    """Names one attempt at one job: who submitted it, and its number there."""

    boss: int
    number: int


class Record(NamedTuple):
    """One mark."""

    mark: bytes
    badge: Badge
    pid: int
    when: int


#: Padded to a power of two: no record crosses a page, where SIGKILL could cut a write in half.
LAYOUT = struct.Struct("=cIIIQ11x")


class Journal:
    """The end to write to."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def note(self, mark: bytes, badge: Badge) -> None:
        """Append a record."""
        os.write(self.fd, LAYOUT.pack(mark, *badge, os.getpid(), time.monotonic_ns()))

    def close(self) -> None:
        """Write no more."""
        os.close(self.fd)


class Reader:
    """The end to read from: all records so far, and what they say together."""

    def __init__(self) -> None:
        self.stream = open(os.memfd_create("journal"), "rb")  # noqa: PTH123, SIM115
        #: Where other processes find it, for as long as this one has it open.
        self.path = Path(f"/proc/{os.getpid()}/fd/{self.stream.fileno()}")
        self.records: list[Record] = []
        #: Files done; one that was done again, since its folder was killed, counts again.
        self.files = 0

    def update(self) -> None:
        """Read what is new; records are written whole, so they can be read whole."""
        for mark, boss, number, pid, when in LAYOUT.iter_unpack(self.stream.read()):
            self.records.append(Record(mark, Badge(boss, number), pid, when))
            self.files += mark == FILE_ENDED

    def close(self) -> None:
        """Read no more."""
        self.stream.close()

    def badges(self, *marks: bytes) -> set[Badge]:
        """The jobs that bear any of these marks."""
        return {record.badge for record in self.records if record.mark in marks}

    def killed(self) -> set[Badge]:
        """The jobs that did not come to their end."""
        return self.badges(DEAD) | (self.badges(SHOT) - self.badges(FILE_ENDED, FOLDER_ENDED))

    def unfinished(self) -> dict[Badge, int]:
        """The jobs that may still run, oldest first, and the processes that run them."""
        over = self.badges(FILE_ENDED, FOLDER_ENDED, SHOT, DEAD)
        return {
            record.badge: record.pid
            for record in self.records
            if record.mark == RUNNING and record.badge not in over
        }

    def intervals(self) -> Iterator[tuple[int, int]]:
        """When jobs surely held a slot: from a mark of work to the mark that ends it.

        A job that was shot held its slot until then, whatever it was doing. Time that is not
        closed by any mark does not count, as nobody knows how long it was.
        """
        since: dict[Badge, int] = {}
        shot: set[Badge] = set()
        for record in sorted(self.records, key=lambda record: record.when):
            if record.mark == RUNNING and record.badge not in shot:
                since[record.badge] = record.when
            elif record.mark in (WAITING, FILE_ENDED, FOLDER_ENDED, SHOT):
                start = since.pop(record.badge, None)
                if start is not None:
                    yield start, record.when
            if record.mark == SHOT:
                shot.add(record.badge)


def peak(intervals: Iterable[tuple[int, int]]) -> int:
    """How many intervals overlap at most."""
    highest = level = 0
    steps = [step for start, stop in intervals for step in ((start, 1), (stop, -1))]
    # Where one ends as another starts they do not overlap: -1 sorts before 1.
    for _, step in sorted(steps):
        level += step
        highest = max(highest, level)
    return highest
