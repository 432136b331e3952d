# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What a process waits for on one pool: one epoll, made when it is first needed.

Three kinds of descriptors: the workers' own (watched), those whose readability is a reason to look
again (armed, for one shot each), and the nudge, by which a thread wakes the one that polls.

The caller holds the lock of the reactor, but for ``poll``.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING, Optional

from . import _forking
from ._slots._section import new_fifo

if TYPE_CHECKING:
    from ._flight import Flight

_READABLE = int(select.EPOLLIN)
# The parent's epoll objects, in a child. Their descriptors are closed, and the numbers perhaps
# those of other files by now, which their finalizers would close.
_inert: list[select.epoll] = []


class Poller:
    """The epoll of one reactor."""

    def __init__(self) -> None:
        self.watched: dict[int, Flight] = {}
        self.closings: int = 0  # how often a watched descriptor has been closed
        self._armed: set[int] = set()
        self.epoll: Optional[select.epoll] = None  # once it has been made: see `get`
        self._nudge = -1

    def get(self) -> select.epoll:
        """Return the epoll object."""
        if self.epoll is None:
            with _forking.books_lock():
                self.epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
                _forking.owned.add(self.epoll.fileno())
        return self.epoll

    def watch(self, flight: Flight) -> None:
        """Watch a worker's descriptors."""
        epoll, channel, pidfd = self.epoll or self.get(), flight.channel, flight.pidfd
        # First what may fail: there may be no descriptor left, or no memory in the kernel.
        epoll.register(channel, _READABLE)
        if pidfd >= 0:
            try:
                epoll.register(pidfd, _READABLE)
            except BaseException:
                epoll.unregister(channel)
                raise
            self.watched[pidfd] = flight
            _forking.owned.add(pidfd)
        self.watched[channel] = flight
        _forking.owned.add(channel)
        flight.poller = self

    def unwatch(self, fd: int) -> None:
        """Watch a worker's descriptor no more; it is about to be closed."""
        # Closing is not enough: a process that is just being forked may share the description.
        self.closings += 1
        del self.watched[fd]
        _forking.owned.discard(fd)
        (self.epoll or self.get()).unregister(fd)

    def arm(self, fd: int) -> None:
        """Report that ``fd`` is readable, once."""
        # One shot: else a descriptor that stays readable, while the thread it concerns has yet to
        # wake, would have the leader spin.
        poller, mask = self.get(), select.EPOLLIN | select.EPOLLONESHOT
        if fd in self._armed:
            return
        try:
            poller.modify(fd, mask)
        except FileNotFoundError:
            poller.register(fd, mask)
        self._armed.add(fd)

    def spent(self, fd: int) -> None:
        """The one shot has been reported."""
        self._armed.discard(fd)

    def spent_perhaps(self) -> None:
        """What has been reported was lost on the way."""
        self._armed.clear()

    def disarm(self, fd: int) -> None:
        """Forget an armed descriptor that is about to be closed."""
        self._armed.discard(fd)
        if self.epoll is not None:
            with contextlib.suppress(FileNotFoundError):
                self.epoll.unregister(fd)

    def prepare_nudge(self) -> None:
        """Make what ``nudge`` needs; OSError if there is no descriptor for it."""
        if self._nudge < 0:
            with _forking.books_lock():
                nudge = new_fifo(1)
                _forking.owned.add(nudge)
            self.get().register(nudge, select.EPOLLIN)
            self._nudge = nudge

    def nudge(self) -> None:
        """Wake whoever polls."""
        with contextlib.suppress(BlockingIOError):  # full: it has yet to look
            os.write(self._nudge, b"!")

    def nudged(self, fd: int, *, take: bool) -> bool:
        """
        Say whether ``fd`` is the nudge.

        Args:
            fd: What has been reported.
            take: For the leader only: read by another thread before the leader has woken, the nudge
                would wake nobody.
        """
        if fd != self._nudge:
            return False
        if take:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 64)
        return True

    def close(self) -> None:
        """Close all that is this object's own; it may be used again."""
        if self._nudge >= 0:
            _forking.owned.discard(self._nudge)
            os.close(self._nudge)
            self._nudge = -1
        epoll, self.epoll = self.epoll, None
        if epoll is not None:
            _forking.owned.discard(epoll.fileno())
            epoll.close()
        self._armed.clear()

    def forget(self) -> None:
        """In a forked child, where all descriptors are closed already."""
        epoll, self.epoll = self.epoll, None
        if epoll is not None:
            _inert.append(epoll)
        for flight in self.watched.values():
            flight.forget()
        self.watched = {}
        self._armed = set()
        self._nudge = -1
