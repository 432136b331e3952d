# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Have the memory of a process that forks in huge pages, where its forks are dear.

A fork copies one entry of the page table for each page, and the end of the child takes it down
again: some 0.2 µs for the two, 45 ms for a GB in pages of 4 kB. A huge page is one entry in place
of 512, and when a write has split it the kernel still copies its entries in one go. Since Linux 6.1
a process may have its memory collapsed into such pages (``MADV_COLLAPSE``).

Guarantees:

* To collapse takes no more time than forks have taken so far, and one piece; where it does not make
  them cheaper, ever less. No call takes longer than a fork and its child's end, and one piece.
* Memory is collapsed where most of it is in use, so that a round lets the process grow by an eighth
  at most; and while the machine, and each control group, has twice as much left as the process has,
  since what a running child still shares is copied. For that reason, too, a forked process does it
  only once it has twice as much memory as when it began to fork.
* Whoever does not want it has it not: huge pages that are switched off for the machine, for the
  process (``PR_SET_THP_DISABLE``) or for a piece of memory (``MADV_NOHUGEPAGE``) are not made.
* Nothing depends on it. Addresses and contents stay, and whatever goes wrong ends it silently.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import groupby, takewhile
from time import monotonic
from typing import Any, Callable, Optional

from ._memory import available, resident

_SETTINGS = "/sys/kernel/mm/transparent_hugepage/"
# Below so many seconds a fork is not dear, and need not be told of, which costs some pages, too. It
# is what a program of some 40 MB takes, and half of it what any does; on another machine more or
# less.
DEAR = 0.0007
# A process with less memory, of which 7 MB are the interpreter's and shared, gains nothing: what it
# writes to after a fork lies everywhere in it.
_LARGE = 32 << 20
# Forks may cost so many seconds before anything is done about it.
_AFTER = 0.05
# So many bytes in one call, as each makes all processors put their lists of pages in order first.
_AT_ONCE = 16 << 20
# Of a range that becomes a huge page at least so much is in use already, as far as one can see: a
# page that was only read counts, too, and is none. So it is also seen how the process grows.
_USED = 0.75
_GROWS = 0.125
# A child's end costs what the fork did.
_BOTH = 2
# After a round, forks may cost so many times what that took before the next; and again so many
# times for each round on end that has not brought their price down to this part.
_PAUSE = 4
_CHEAPER = 0.7
_MOST_STRIKES = 10
# A round that failed counts for so many.
_FAILURE = 3
# What the kernel has told of this process's memory is believed for so many seconds.
_NEWS = 0.01


class Collapser:
    """
    Decides when to collapse, and how much at once.

    Args:
        a_round: Returns what collapses all memory piece by piece, see ``collapsing``.
        size: Returns how many bytes of memory this process has.
    """

    def __init__(
        self, a_round: Callable[[], Iterator[float]], size: Callable[[], int] = resident
    ) -> None:
        self._a_round = a_round
        self._size = size
        self._begin(0)

    def _begin(self, inherited: int) -> None:
        self._pid = os.getpid()
        # Of one's own: at the fork another thread may have held the parent's.
        self._lock = threading.Lock()
        self._inherited = inherited  # bytes
        self._credit = 0.0  # seconds that may be spent
        self._due = _AFTER
        self._forks = 0
        self._cost = 0.0  # of these
        self._price = 0.0  # of a fork, before the last round
        self._strikes = 0
        self._round: Optional[Iterator[float]] = None
        self._took = 0.0

    def forked(self, seconds: float) -> None:
        """Tell that a fork has taken so long. May take twice as long, and one piece."""
        try:
            if os.getpid() != self._pid:
                self._begin(self._size())
            if self._lock.acquire(blocking=False):
                try:
                    self._forked(seconds)
                finally:
                    self._lock.release()
        except Exception:  # noqa: BLE001  # no /proc, no ctypes, no descriptor, no memory
            self._strikes = min(self._strikes + _FAILURE, _MOST_STRIKES)
            self._end_round()

    def _forked(self, seconds: float) -> None:
        self._forks += 1
        self._cost += seconds
        self._credit += _BOTH * seconds
        if self._round is None and self._credit >= self._due:
            self._begin_round()
        budget = min(self._credit, _BOTH * seconds)
        while self._round is not None and budget > 0:
            took = next(self._round, None)
            if took is None:
                self._end_round()
                return
            self._took += took
            self._credit -= took
            budget -= took

    def _begin_round(self) -> None:
        if self._size() < max(_LARGE, 2 * self._inherited):
            self._credit = 0.0  # perhaps later
            return
        price = self._cost / self._forks
        useless = self._price and price > _CHEAPER * self._price
        self._strikes = min(self._strikes + 1, _MOST_STRIKES) if useless else 0
        self._price = price
        self._took = 0.0
        self._round = self._a_round()

    def _end_round(self) -> None:
        self._round = None
        self._credit = self._cost = 0.0
        self._forks = 0
        self._due = max(_AFTER, self._took) * _PAUSE ** (1 + self._strikes)


def collapsing() -> Iterator[float]:
    """Collapse all memory of this process, piece by piece; yields how long each has taken."""
    began = monotonic()
    size = _huge_page()
    most = resident() * (1 + _GROWS)
    if not size or not _is_room():
        return
    from . import _native

    pieces = _pieces(0, size)
    while (piece := next(pieces, None)) is not None:
        address, length = piece
        found = worth_it(_native, address, length, size)
        for part in found:
            _native.collapse(*part)
        if found and not (resident() < most and _is_room()):
            return
        paused = monotonic()
        yield paused - began
        began = monotonic()
        if began - paused > _NEWS:
            pieces = _pieces(address + length, size)


def _is_room() -> bool:
    return available() >= 2 * resident()


def _huge_page() -> int:
    """Return the size of a huge page; 0 if there are none, or nobody may have them."""
    major, minor, *_rest = f"{os.uname().release}.0".split(".")
    digits = "".join(takewhile(str.isdigit, minor))
    if (int(major), int(digits or 0)) < (6, 1) or not _may_be("enabled"):
        return 0
    with open(_SETTINGS + "hpage_pmd_size", "rb") as file:
        size = int(file.read())
    # Since Linux 6.8 there are switches for each size, of which the others are not used here.
    own = f"hugepages-{size >> 10}kB/enabled"
    if os.path.exists(_SETTINGS + own) and not _may_be(own):
        return 0
    return size if size <= _AT_ONCE else 0  # with pages of 64 kB it would be half a GB


def _may_be(switch: str) -> bool:
    with open(_SETTINGS + switch, "rb") as file:
        return b"[never]" not in file.read()


def _pieces(after: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield addresses and lengths of memory of this process's own, that comes from no file."""
    with open("/proc/self/maps", "rb") as file:
        lines = file.read().split(b"\n")
    at_once = _AT_ONCE // size * size
    for line in lines[:-1]:
        addresses, mode, _offset, _device, inode, *name = line.split(None, 5)
        if mode != b"rw-p" or inode != b"0" or name == [b"[stack]"]:
            continue
        first, last = (int(address, 16) for address in addresses.split(b"-"))
        start, end = -(-max(first, after) // size) * size, last // size * size
        for address in range(start, end, at_once):
            yield address, min(at_once, end - address)


def worth_it(native: Any, address: int, length: int, size: int) -> list[tuple[int, int]]:
    """Return the addresses and the lengths of the parts that are used enough."""
    each = size // os.sysconf("SC_PAGE_SIZE")
    pages = native.in_memory(address, length)  # none if it is no longer mapped
    counts = [sum(pages[first : first + each]) for first in range(0, len(pages), each)]
    found = []
    for is_used, group in groupby(counts, (_USED * each).__le__):
        part = len(list(group)) * size
        if is_used:
            found.append((address, part))
        address += part
    return found


forked = Collapser(collapsing).forked
