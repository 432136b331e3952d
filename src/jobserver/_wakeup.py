# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Wake a thread that waits in a reactor."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING

from . import _forking
from ._signals import deferred
from ._slots._section import new_fifo

if TYPE_CHECKING:
    from ._reactor import Reactor


class Wakeup:
    """
    A descriptor that is readable from ``ring`` to ``quiet``.

    ``ring`` takes no lock that its caller could hold: it works inside the garbage collector, which
    may run in any thread, at any instant.
    """

    def __init__(self, reactor: Reactor) -> None:
        self.rung = False
        self._reactor = reactor
        self._lock = threading.RLock()
        with deferred(), reactor.lock:
            reactor.poller.get()  # so that the thread need not find a descriptor for it
        self._fd = -1
        try:
            with deferred(), _forking.books_lock():
                self._fd = new_fifo(1)
                _forking.owned.add(self._fd)
                _forking.track(self, at_leisure=True)
        except BaseException:
            self.close()  # nobody will have this object
            raise

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._fd

    def ring(self) -> None:
        """Wake the thread, now or when it next waits."""
        with deferred(), self._lock:
            if not self.rung and self._fd >= 0:
                try:
                    os.write(self._fd, b"!")
                finally:
                    self.rung = True

    def quiet(self) -> None:
        """Take back all rings so far. Look at what has changed after this, not before."""
        with deferred(), self._lock:
            if self.rung:
                self.rung = False
                with contextlib.suppress(BlockingIOError):  # Ctrl-C hit the ringer before its write
                    os.read(self._fd, 64)

    def close(self) -> None:
        """Close the descriptor; to ring does nothing from now on."""
        with deferred(), self._lock:
            fd, self._fd = self._fd, -1
            self.rung = False
        if fd >= 0:
            self._reactor.disarm(fd)
            _forking.close(fd)

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """The thread is the parent's, and the descriptor is closed already."""
        self._lock = threading.RLock()
        self._fd = -1
        self.rung = False
