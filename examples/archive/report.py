# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What is known of a file, or of a folder with everything below it."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Callable, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

#: Lines in each of the lists of largest, slowest and best compressed files.
TOP = 5

#: Smaller files say nothing about how well something compresses.
WORTH_COMPRESSING = 1024


class Row(NamedTuple):
    """One file in one of those lists."""

    path: Path
    size: int
    packed: int
    lines: int
    functions: int
    seconds: float


class Problem(NamedTuple):
    """Something that kept a file or a folder from being reported in full."""

    path: Path
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """The report of one file, or the sum of the reports of a folder's children.

    Its size does not grow with the tree (but for the problems), so that a result stays small to
    send, however many files it speaks of.
    """

    path: Path
    #: "file", "folder", "link", "special" (a FIFO, a device, ...) or "unreadable".
    kind: str
    #: SHA-256 of what a file contains, where a link points, or what a folder lists.
    digest: bytes
    files: int = 0
    folders: int = 0
    size: int = 0
    packed: int = 0
    tokens: int = 0
    lines: int = 0
    functions: int = 0
    #: Seconds by stage of the work.
    seconds: dict[str, float] = field(default_factory=dict)
    largest: tuple[Row, ...] = ()
    slowest: tuple[Row, ...] = ()
    best: tuple[Row, ...] = ()
    problems: tuple[Problem, ...] = ()


def combine(
    path: Path, children: Sequence[Report], kind: str = "folder", problems: Sequence[Problem] = ()
) -> Report:
    """Make a folder's report from its children's; the digests become the next Merkle node."""
    return Report(
        path,
        kind,
        digest=sha256(listing(children)).digest(),
        files=sum(child.files for child in children),
        folders=1 + sum(child.folders for child in children),
        size=sum(child.size for child in children),
        packed=sum(child.packed for child in children),
        tokens=sum(child.tokens for child in children),
        lines=sum(child.lines for child in children),
        functions=sum(child.functions for child in children),
        seconds=add_up(child.seconds for child in children),
        largest=top(children, lambda child: child.largest, lambda row: row.size),
        slowest=top(children, lambda child: child.slowest, lambda row: row.seconds),
        best=top(children, lambda child: child.best, lambda row: -row.packed / row.size),
        problems=(*problems, *(problem for child in children for problem in child.problems)),
    )


def listing(children: Iterable[Report]) -> bytes:
    """What a folder contains, as bytes: kind, digest, length and name of each child, by name.

    The length keeps a name that contains line feeds from looking like two children.
    """
    lines: list[bytes] = []
    for child in sorted(children, key=lambda child: os.fsencode(child.path.name)):
        name = os.fsencode(child.path.name)
        head = f"{child.kind} {child.digest.hex()} {len(name)} "
        lines.append(head.encode() + name + b"\n")
    return b"".join(lines)


def top(
    children: Iterable[Report],
    rows: Callable[[Report], tuple[Row, ...]],
    key: Callable[[Row], float],
) -> tuple[Row, ...]:
    """The best rows of all children, best first."""
    return tuple(heapq.nlargest(TOP, (row for child in children for row in rows(child)), key))


def add_up(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Seconds by stage, over many reports."""
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total
