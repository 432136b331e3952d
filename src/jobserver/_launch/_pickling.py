# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Pickle a task for another process, together with the descriptors it refers to.

``multiprocessing`` objects (queues, locks, connections, shared memory, proxies) agree to be
pickled only while a process is being started, and ask whoever starts it to pass descriptors on.
Here that is us.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterator
from multiprocessing.context import get_spawning_popen, set_spawning_popen
from types import FunctionType
from typing import Any, NamedTuple

from jobserver._dump import _PLAIN, ahead
from jobserver._errors import shown
from jobserver._signals import lifted
from jobserver._wire import Buffer, dump
from jobserver._worker._inherit import InheritedFd
from jobserver._worker._task import Task


class Pickled(NamedTuple):
    """A task on its way: its pieces, and the descriptors that go along."""

    payload: list[Buffer]
    fds: list[int]


class _Starting:
    """Stands in for the Popen object that multiprocessing's reductions talk to."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        """Note a descriptor; returns its place in the list that the worker gets."""
        self.fds.append(fd)
        return len(self.fds) - 1

    def DupFd(self, place: int) -> InheritedFd:  # noqa: N802  # multiprocessing's name
        """Return what the worker unpickles to the descriptor."""
        return InheritedFd(place)


# A string that is longer may take its time.
_SHORT = 1 << 12


def is_plain(task: Task) -> bool:
    """
    Say whether a task is a function by its name, and next to nothing: pickled within microseconds,
    without any code of the user's, descriptor or buffer.
    """
    fn, args, kwargs, env, preexec_fn, first = task
    if type(fn) is not FunctionType or kwargs or env or preexec_fn is not None or first is not None:
        return False
    for arg in args:
        kind = type(arg)
        if kind not in _PLAIN or (kind is str and len(arg) > _SHORT):
            return False
    return len(args) < _SHORT


def pickle_task(task: Task, method: str) -> Pickled:
    """Pickle ``task``; TypeError that names the start method if that is not possible."""
    if is_plain(task):
        return Pickled([pickle_plain(task, method)], [])
    with lifted():
        return _pickle(task, method)


def pickle_plain(task: Task, method: str) -> bytes:
    """Pickle a task that is plain; see ``pickle_task``."""
    # The pickler treats these just as that of multiprocessing does.
    try:
        return pickle.dumps(tuple(task), 5)
    except Exception as error:
        raise _refusal(error, method) from error


def _refusal(error: Exception, method: str) -> TypeError:
    why = _text_of(error)
    return TypeError(f"the job is not picklable, which the start method {method!r} needs: {why}")


def _pickle(task: Task, method: str) -> Pickled:
    _guard_locks()
    starting: Any = _Starting()
    outer = get_spawning_popen()
    set_spawning_popen(starting)
    try:
        payload = dump(tuple(task))
    except Exception as error:
        raise _refusal(error, method) from error
    finally:
        set_spawning_popen(outer)
    return Pickled(payload, starting.fds)


def _text_of(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # of the user's
        return shown(error)


class _Refusing:
    """Stands in for it where no descriptors can go along."""

    def duplicate_for_child(self, fd: int) -> int:
        """Refuse."""
        raise TypeError(f"descriptor {fd} cannot go along")

    def DupFd(self, fd: int) -> Any:  # noqa: N802  # multiprocessing's name
        """Refuse; without this, multiprocessing would offer it on a socket of its own."""
        raise TypeError(f"descriptor {fd} cannot go along")


@contextlib.contextmanager
def refusing_descriptors() -> Iterator[None]:
    """Meanwhile what refers to descriptors cannot be pickled by this thread."""
    _guard_locks()
    refusing: Any = _Refusing()
    outer = get_spawning_popen()
    set_spawning_popen(refusing)
    try:
        yield
    finally:
        set_spawning_popen(outer)


def _guard_locks() -> None:
    # If it has not been imported there is no lock.
    synchronize: Any = sys.modules.get("multiprocessing.synchronize")
    if synchronize is not None and not ahead:
        for name in ("Lock", "RLock", "Semaphore", "BoundedSemaphore"):
            ahead[getattr(synchronize, name)] = _reduce_lock


def _reduce_lock(lock: Any) -> Any:
    # Before Python 3.12 it would be pickled as an address in the memory of this process.
    if lock._semlock.name is None:
        raise TypeError("a lock of a fork context has no name by which another process can open it")
    return lock.__reduce_ex__(5)
