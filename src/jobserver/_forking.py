# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What must be right when this process forks, at any instant and in any thread.

Guarantees:

* Whoever opens descriptors that a forked child must not keep does so, and notes them in a tracked
  object, under ``launch_lock``. The lock is taken around every fork, also the user's own, so a
  child never inherits a descriptor that is nowhere noted: end-of-file on a channel means death.
* In the child each tracked object closes what is the parent's alone, and forgets it. Before any of
  them the epoch changes, which makes inert whatever acts on descriptors when it is finalized.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol


class _Tracked(Protocol):
    def after_fork_in_child(self, passed: frozenset[int]) -> None: ...


class _State:
    """The one per-process state, so that a fork can replace it whole."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.tracked: weakref.WeakSet[Any] = weakref.WeakSet()
        self.passed: frozenset[int] = frozenset()
        self.epoch = 0


_state = _State()


def launch_lock() -> threading.RLock:  # type: ignore[valid-type, unused-ignore]
    """Return the lock that is held while a worker is launched, and around every fork."""
    return _state.lock


def epoch() -> int:
    """Return a number that differs between a process and those forked from it."""
    return _state.epoch


def track(thing: _Tracked) -> None:
    """Have ``thing.after_fork_in_child`` called in every forked child, while ``thing`` lives."""
    with _state.lock:
        _state.tracked.add(thing)


def fork(passed: frozenset[int]) -> int:
    """Fork; the child keeps the descriptors ``passed``. Call with ``launch_lock`` held."""
    _state.passed = passed
    try:
        return os.fork()
    finally:
        _state.passed = frozenset()


class _Pending:
    """Descriptors that are between their opening and their being noted in a tracked object."""

    def __init__(self) -> None:
        self._fds: set[int] = set()

    def add(self, fd: int) -> None:
        self._fds.add(fd)

    def discard(self, fd: int) -> None:
        self._fds.discard(fd)

    def after_fork_in_child(self, passed: frozenset[int]) -> None:
        fds, self._fds = self._fds, set()
        for fd in fds - passed:
            os.close(fd)


pending = _Pending()
track(pending)


def _before() -> None:
    _state.lock.acquire()


def _after_in_parent() -> None:
    _state.lock.release()


def _after_in_child() -> None:
    _state.epoch += 1
    tracked, passed = list(_state.tracked), _state.passed
    # The lock was held by the forking thread, which is this one under a new identity.
    _state.lock = threading.RLock()
    for thing in tracked:
        thing.after_fork_in_child(passed)


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
