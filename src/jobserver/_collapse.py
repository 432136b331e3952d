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
  them cheaper, ever less.
* Memory is collapsed where most of it is in use, so that the process does not grow; and while the
  machine, and each control group, has twice as much left as the process has, since what a running
  child still shares is copied. For that reason, too, a forked process does it only once it has
  twice as much memory as when it began to fork.
* Whoever does not want it has it not: huge pages that are switched off for the machine, for the
  process (``PR_SET_THP_DISABLE``) or for a piece of memory (``MADV_NOHUGEPAGE``) are not made.
* Nothing depends on it. Addresses and contents stay, and whatever goes wrong ends it silently.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import groupby
from time import monotonic
from typing import Any, Callable, Optional

from ._memory import available, resident

_SETTINGS = "/sys/kernel/mm/transparent_hugepage/"
# Below so many seconds a fork is not dear, and need not be told of. It is what a program of some
# 30 MB takes, and half of it what any does; on another machine it may be less or more than that.
DEAR = 0.0005
# A process with less memory, of which 7 MB are the interpreter's and shared, gains nothing: what it
# writes to after a fork lies everywhere in it.
_LARGE = 32 << 20
# Forks may cost so many seconds before anything is done about it.
_AFTER = 0.05
# So many bytes in one call, as each makes all processors put their lists of pages in order first.
_AT_ONCE = 16 << 20
# Of a range that becomes a huge page at least so much is in use already.
_USED = 0.75
# A child's end costs what the fork did.
_BOTH = 2
# After a round, forks may cost so many times what that took before the next; and again so many
# times for each round on end that has not brought their price down to this part.
_PAUSE = 4
_CHEAPER = 0.7
_MOST_STRIKES = 10


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
        # Held for a moment; in a child that another thread has forked then, for good: no harm.
        self._lock = threading.Lock()
        self._off = False
        self._begin(0)

    def _begin(self, inherited: int) -> None:
        self._pid = os.getpid()
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
        """Tell that a fork has taken so long; now and then, returns twice as much later."""
        if self._off or not self._lock.acquire(blocking=False):
            return
        try:
            if os.getpid() != self._pid:
                self._begin(self._size())
            self._forks += 1
            self._cost += seconds
            self._credit += _BOTH * seconds
            if self._round is None and self._credit >= self._due:
                self._begin_round()
            if self._round is not None:
                self._go_on()
        except Exception:  # noqa: BLE001  # no /proc, no ctypes, no memory
            self._off = True
        finally:
            self._lock.release()

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

    def _go_on(self) -> None:
        assert self._round is not None  # noqa: S101
        while self._credit > 0:
            took = next(self._round, None)
            if took is None:
                self._round = None
                self._credit = self._cost = 0.0
                self._forks = 0
                self._due = max(_AFTER, self._took) * _PAUSE ** (1 + self._strikes)
                return
            self._took += took
            self._credit -= took


def collapsing() -> Iterator[float]:
    """Collapse all memory of this process, piece by piece; yields how long each has taken."""
    began = monotonic()
    size = _huge_page()
    if not size or available() < 2 * resident():
        return
    from . import _native

    for start, end in list(_private()):
        for address, length in _worth_it(_native, start, end, size):
            _native.collapse(address, length)
            now = monotonic()
            yield now - began
            began = now
            if available() < 2 * resident():
                return


def _huge_page() -> int:
    """Return the size of a huge page; 0 if there are none, or nobody may have them."""
    major, minor = os.uname().release.split(".")[:2]
    if (int(major), int(minor)) < (6, 1):
        return 0
    with open(_SETTINGS + "enabled", "rb") as file:
        if b"[never]" in file.read():
            return 0
    with open(_SETTINGS + "hpage_pmd_size", "rb") as file:
        return int(file.read())


def _private() -> Iterator[tuple[int, int]]:
    """Yield where this process has memory of its own that comes from no file."""
    with open("/proc/self/maps", "rb") as file:
        lines = file.read().splitlines()
    for line in lines:
        addresses, mode, _offset, _device, inode, *name = line.split(None, 5)
        if mode == b"rw-p" and inode == b"0" and name != [b"[stack]"]:
            start, _, end = addresses.partition(b"-")
            yield int(start, 16), int(end, 16)


def _worth_it(native: Any, start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses and the lengths of the parts that are used enough."""
    start, end = -(-start // size) * size, end // size * size
    each = size // os.sysconf("SC_PAGE_SIZE")
    while start < end:
        length = min(end - start, max(size, _AT_ONCE // size * size))
        pages = native.in_memory(start, length)
        if not pages:  # no longer mapped
            start += length
        counts = [sum(pages[first : first + each]) for first in range(0, len(pages), each)]
        for is_used, group in groupby(counts, (_USED * each).__le__):
            part = len(list(group)) * size
            if is_used:
                yield start, part
            start += part


forked = Collapser(collapsing).forked
