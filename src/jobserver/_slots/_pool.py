# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The tokens of one Jobserver, in sections, shared by every process that inherits the descriptors.

Nothing is in the file system. Pipes are anonymous, and who needs a description of its own reopens
an inherited descriptor through /proc.

Descriptors: about two for each slot up to 64 slots, about one for each beyond, and not more than a
quarter of what RLIMIT_NOFILE allows. Slots in excess of the berths this gives work as well, on
plain tokens, which a SIGKILL of their holder loses.
"""

from __future__ import annotations

import os
from multiprocessing import reduction
from typing import Any, Optional

from jobserver import _forking

from ._lease import Lease
from ._makeflags import Outer
from ._section import PATIENCE, Section, new_fifo, ring_of, write_all
from ._splice import waiting_bytes

_books = _forking.books_lock()
# What an unprivileged process may make a ring of pages, less one that partly read bytes may take.
_LARGEST = 255
# Up to this many slots there are twice as many berths, so that a random berth is free at the
# second try; beyond it descriptors are the scarcer good.
_AMPLE = 64
_MARGIN = 8
# Berths beyond the number of tokens, as those that are being tried cannot be had meanwhile.
_SPARE = 4


class SlotPool:
    """Take, return and wait for tokens."""

    def __init__(self, slots: int, sections: list[Section], *, joined: bool = False) -> None:
        self.slots = slots
        self.sections: list[Section] = sections
        for number, section in enumerate(sections):
            section.number = number
        # The first section of a joined pool holds the implicit slot of this process tree.
        self.joined = joined
        # In the process that has joined an outer pool: what its janitor waits for; -1 before.
        self._janitor: Optional[int] = None
        # What ``run`` watches its FIFOs with, from one command to the next; -1 for none.
        self.spare_watch: int = -1
        self.held_fds: set[int] = set()
        self.key: tuple[int, int] = _identity(sections[0].pipe)
        _forking.track(self)

    @classmethod
    def create(cls, slots: int, *, warm: bool = False) -> SlotPool:
        """Make a new pool of ``slots`` free tokens; with seats for idle workers if ``warm``."""
        sections: list[Section] = []
        opened: list[int] = []
        budget = _budget()
        try:
            rest = slots
            while rest:
                size = min(rest, _LARGEST)
                pipe = new_fifo(size + 1)
                opened.append(pipe)
                size = min(size, max(ring_of(pipe) - 1, _MARGIN))
                ample = warm or slots <= _AMPLE
                wanted = 2 * size + _MARGIN if ample else size + _MARGIN
                berths = _open_berths(min(wanted, budget), opened)
                budget -= len(berths)
                section = Section(pipe, berths, _seats(berths, size) if warm else 0)
                write_all(section.pipe, b"+" * size)
                sections.append(section)
                rest -= size
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise OSError(
                error.errno,
                f"cannot open the descriptors that {slots} slots need"
                f" ({os.strerror(error.errno or 0)}): raise RLIMIT_NOFILE or use fewer slots",
            ) from error
        return cls(slots, sections)

    @classmethod
    def join(cls, outer: Outer, *, warm: bool = False) -> SlotPool:
        """
        Take part in an outer pool, with the implicit slot that every started command owns.

        Args:
            outer: What MAKEFLAGS tells of the pool.
            warm: Whether there are to be seats for idle workers.
        """
        slots = outer.slots or len(os.sched_getaffinity(0))
        opened = [outer.fd]
        try:
            opened.append(new_fifo(1))
            # The implicit slot is the first to be used: it costs nobody else anything.
            own = _open_berths(_MARGIN, opened)
            others = _open_berths(min(2 * slots + _MARGIN, _budget()), opened)
            sections = [
                Section(opened[1], own, _seats(own, 1) if warm else 0),
                Section(outer.fd, others, _seats(others, slots - 1) if warm else 0),
            ]
            write_all(opened[1], b"+")
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        pool = cls(slots, sections, joined=True)
        pool._janitor = -1
        return pool

    def shared_pipe(self) -> int:
        """Return the pipe to offer to commands: of several, that with the most free tokens."""
        return max((part.pipe for part in self.sections[self.joined :]), key=waiting_bytes)

    def filenos(self) -> list[int]:
        """Return the descriptors of which one is readable while a token is free."""
        return [section.pipe for section in self.sections]

    def free(self) -> int:
        """Return how many tokens are free at this instant."""
        return sum(waiting_bytes(section.pipe) for section in self.sections)

    def try_take(self, *, seat: bool = False) -> Optional[Lease]:
        """
        Take a free token, or return None.

        Args:
            seat: Into a berth that may be kept when the token has gone back, if there is one.

        Raises:
            OSError: No descriptor is left for the lease.
        """
        for section in self.sections:
            if self._janitor == -1 and section is not self.sections[0]:
                self._start_janitor(section)
            for patience in range(PATIENCE, -1, -1):
                with _books:  # no fork between the opening and the noting
                    taken = section.take(seat=seat)
                    if taken is not None:
                        fd, berth = taken
                        return Lease(self, fd, berth, section)
                # Looked at again, as a token may have come back just now: one that is free is not
                # a reason to do without a berth, but that every berth has a token in it is.
                if not waiting_bytes(section.pipe):
                    break
                if patience and not section.full():
                    os.sched_yield()  # others are about to find that they came too late
                    continue
                try:
                    token = os.read(section.pipe, 1)
                except BlockingIOError:
                    break
                return Lease(self, -1, -1, section, token)
        return None

    def _start_janitor(self, outer: Section) -> None:
        if not waiting_bytes(outer.pipe):
            return
        from ._janitor import start

        with _books:
            if self._janitor is None:
                return  # another thread is at it
            self._janitor = None
        try:
            self._janitor = start(outer.pipe, outer.berths)
        except OSError:
            return  # no process is left for it: what this one holds is lost if it is killed

    def reserve(self) -> Optional[Lease]:
        """Take a seat without a token, in the first section that has one, or return None."""
        for section in self.sections:
            with _books:
                taken = section.reserve()
                if taken is not None:
                    fd, berth = taken
                    return Lease(self, fd, berth, section)
        return None

    def adopt(self, fd: int, section: int, berth: int) -> Lease:
        """Make a lease of what somebody handed over."""
        home = self.sections[section]
        return Lease(self, fd, berth, home, b"+" if fd < 0 else b"")

    def sweep(self) -> int:
        """Put the tokens of dead holders back; any process may, at any time. Returns how many."""
        with _books:
            return sum(section.sweep() for section in self.sections)

    def after_fork_in_child(self, passed: frozenset[int]) -> None:
        """Close the leases that only the parent holds; its Lease objects become inert here."""
        self._janitor = None  # the parent's, as is this
        self.spare_watch = -1
        fds, self.held_fds = self.held_fds, set()
        for fd in fds - passed:
            os.close(fd)

    @property
    def closed(self) -> bool:
        """Whether this process has let go of the pool."""
        return not self.sections

    def close(self) -> None:
        """Close this process's descriptors. Leases already taken can no longer be released."""
        sections, self.sections = self.sections, []
        janitor, self._janitor = self._janitor, None
        spare, self.spare_watch = self.spare_watch, -1
        for fd in (janitor, spare):
            if fd is not None and fd >= 0:
                _forking.close(fd)
        for section in sections:
            for fd in (section.pipe, *section.berths):
                os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "sections"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # reduction.DupFd hands the descriptors to the process being started, however it is started.
        dup = reduction.DupFd
        parts = [
            (part.seats, [dup(fd) for fd in (part.pipe, *part.berths)]) for part in self.sections
        ]
        return _rebuild, (self.slots, parts, self.joined)


def _open_berths(count: int, opened: list[int]) -> list[int]:
    """Open berths, noting each in ``opened`` for the case that a later one cannot be."""
    for _ in range(count):
        opened.append(new_fifo(1))  # noqa: PERF401
    return opened[len(opened) - count :]


def _rebuild(slots: int, parts: list[tuple[int, list[Any]]], joined: bool) -> SlotPool:
    sections = []
    for seats, handed_fds in parts:
        fds = [handed_fd.detach() for handed_fd in handed_fds]
        for fd in fds:
            os.set_inheritable(fd, False)
        sections.append(Section(fds[0], fds[1:], seats))
    return SlotPool(slots, sections, joined=joined)


def _seats(berths: list[int], tokens: int) -> int:
    """
    Return how many berths may be kept without a token.

    As many as there are tokens, at most; and the other berths have room for all of those.
    """
    return max(0, min(tokens, len(berths) - tokens - _SPARE))


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _budget() -> int:
    """Return how many descriptors berths may take; the rest is for jobs and for the program."""
    import resource  # a library that no worker needs unless it makes a pool

    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(soft // 4, _MARGIN)
