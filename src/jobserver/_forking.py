# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What must be right when this process forks, at any instant and in any thread.

Guarantees:

* Whoever opens descriptors that a forked child must not keep does so, and notes them in ``owned``
  or in a tracked object, under ``books_lock``. The lock is taken around every fork, also the
  user's own, so a child never inherits a descriptor that is nowhere noted: end-of-file on a channel
  means death.
* Nobody holds the lock while he forks, other than by the hook itself: libraries that are imported
  later have hooks that take their locks before ours, and all forks must take them in one order.
* In the child they are closed at once. Before anything else the epoch changes, which makes inert
  whatever acts on descriptors when it is finalized.
* What tracked objects remember of the parent's jobs they forget in the child, at once; or, in a
  worker of ours, when the job first uses one of them (``settle``): most jobs never do, and each
  page that a child writes to costs as much as hundreds of instructions.
"""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import os
import socket
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Callable, Protocol


class _Tracked(Protocol):
    def after_fork_in_child(self, passed: frozenset[int]) -> None: ...


# Sockets without the methods in Python, which are made in a fifth of the time.
PlainSocket: Any = _socket.socket
AF_UNIX = int(socket.AF_UNIX)
_socketpair: Any = _socket.socketpair
# What a fresh child looks up as an attribute of a module costs it a page or two more.
_close, _get_ident = os.close, threading.get_ident
# Descriptors that are this process's alone.
owned: set[int] = set()

_lock: Any = threading.RLock()
# No WeakSet: to go through one calls eight functions, whose pages each child would have to copy.
_at_once: dict[int, weakref.ref[Any]] = {}
_calls: list[Callable[[frozenset[int]], None]] = []
_at_leisure: dict[int, weakref.ref[Any]] = {}
_epoch = 0
# What the child that a thread is forking keeps, by thread; a worker of ours if there is an entry.
_passing: dict[int, tuple[int, ...]] = {}
# Late releases of Python close the resource tracker's descriptor in the child of any fork that is
# not marked so; and the child's own tracker would unlink shared memory that is not its own.
_UNKNOWN: Any = object()
_intent: Any = _UNKNOWN
# Set in a worker: what its parent remembered is still to be forgotten.
_stale = False


def books_lock() -> Any:
    """Return the lock under which descriptors are opened and noted; held around every fork."""
    return _lock


def epoch() -> int:
    """Return a number that differs between a process and those forked from it."""
    return _epoch


def track(thing: _Tracked, *, at_leisure: bool = False) -> None:
    """
    Have ``thing.after_fork_in_child`` called in every forked child, while ``thing`` lives.

    Args:
        thing: Who is to forget what is the parent's.
        at_leisure: It may wait for ``settle``: its descriptors are in ``owned``.
    """
    tracked, key = _at_leisure if at_leisure else _at_once, id(thing)
    with _lock:
        tracked[key] = weakref.ref(thing, lambda _: tracked.pop(key, None))


def call_in_children(function: Callable[[frozenset[int]], None]) -> None:
    """
    Have it called in every forked child, at once, with the descriptors that it keeps.

    For what is never undone: ``track`` takes a lock and makes a reference, in each worker anew.
    """
    _calls.append(function)


def fork(passed: tuple[int, ...]) -> int:
    """Fork a worker that keeps the descriptors ``passed``, of which -1 is none."""
    me = threading.get_ident()
    intent = _intent if _intent is not _UNKNOWN else _look_for_intent()
    _passing[me] = passed
    try:
        if intent is None:
            return os.fork()
        intent.preserve_fd = True
        return os.fork()
    finally:
        if intent is not None:
            intent.preserve_fd = False
        _passing.pop(me, None)


def _look_for_intent() -> Any:
    global _intent  # noqa: PLW0603
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    found = getattr(tracker, "_fork_intent", None)
    if tracker is not None and not getattr(tracker.__spec__, "_initializing", False):
        _intent = found  # else it may yet come
    return found


def lifted(fd: int) -> int:
    """
    Return ``fd``; in place of 0, 1 or 2, which the program has closed, another one for the same.

    What is printed there would be taken for tokens or an answer, and a worker's stdin is put there.
    """
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


@contextlib.contextmanager
def streams_held() -> Iterator[None]:
    """
    Keep the numbers 0, 1 and 2 from being given to other files meanwhile.

    Where the program has closed them, multiprocessing could start nothing: its own pipe would get
    them. To be called with signals deferred.
    """
    held: list[int] = []
    try:
        while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
            held.append(fd)
        os.close(fd)
        yield
    finally:
        for fd in held:
            os.close(fd)


def _both_lifted(one: int, other: int) -> tuple[int, int]:
    try:
        one = lifted(one)
    except BaseException:
        os.close(other)
        raise
    try:
        return one, lifted(other)
    except BaseException:
        os.close(one)
        raise


def open_pipe() -> tuple[int, int]:
    """Open a pipe, and note both ends."""
    with _lock:
        reader, writer = os.pipe()
        if reader < 3 or writer < 3:
            reader, writer = _both_lifted(reader, writer)
        owned.update((reader, writer))
        return reader, writer


def open_sockets(kind: int) -> tuple[socket.socket, socket.socket]:
    """Open a pair of Unix sockets, and note both."""
    with _lock:
        ours, theirs = _socketpair(AF_UNIX, kind)
        if ours.fileno() < 3 or theirs.fileno() < 3:
            fds = _both_lifted(ours.detach(), theirs.detach())
            ours, theirs = (PlainSocket(AF_UNIX, kind, 0, fd) for fd in fds)
        if socket.getdefaulttimeout() is not None:  # the user's, which is not about ours
            ours.settimeout(None)
            theirs.settimeout(None)
        owned.update((ours.fileno(), theirs.fileno()))
        return ours, theirs


def close(fd: int) -> None:
    """Close a descriptor that was noted."""
    with _lock:
        owned.discard(fd)
        os.close(fd)


def close_socket(sock: socket.socket) -> None:
    """Close a socket that was noted."""
    with _lock:
        owned.discard(sock.fileno())
        sock.close()


def settle() -> None:
    """Called by whatever a job may use first of what it has inherited."""
    if _stale:
        _forget_at_leisure()


def stale() -> bool:
    """Say whether what this process remembers is its parent's."""
    return _stale


def _forget_at_leisure() -> None:
    global _stale  # noqa: PLW0603
    _stale = False
    _tell(_at_leisure, frozenset())


def _tell(tracked: dict[int, weakref.ref[Any]], passed: frozenset[int]) -> None:
    for ref in list(tracked.values()):
        thing = ref()
        if thing is not None:
            thing.after_fork_in_child(passed)


def _after_in_child() -> None:
    global _epoch, _stale  # noqa: PLW0603
    _epoch += 1
    # However often the thread that forked had acquired it, nobody here is to release it.
    _lock._at_fork_reinit()
    found = _passing.get(_get_ident())
    _passing.clear()
    passed = frozenset(found or ())
    for fd in owned:
        if fd not in passed:
            try:
                _close(fd)
            except OSError:  # the program has closed what is not its own
                pass
    owned.clear()
    for call in _calls:
        call(passed)
    _tell(_at_once, passed)
    _stale = True
    if found is None:
        _forget_at_leisure()


# The lock's own methods, not functions of ours: no signal handler can run inside them, so no
# exception from one leaves the lock held.
os.register_at_fork(
    before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_in_child
)
