# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Launch workers that are not forked from this process: by spawn, or by the zygote."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from multiprocessing import resource_tracker
from typing import Any, Callable, NamedTuple, Optional

from jobserver import _forking
from jobserver._fds import send_job
from jobserver._flight import Flight, child_exit_status
from jobserver._signals import deferred, lifted
from jobserver._slots._lease import Lease
from jobserver._wire import ASIDE, TASK, encode
from jobserver._worker._protocol import Head, pack_head
from jobserver._worker._stay import Stays
from jobserver._worker._task import Task

from . import _zygote
from ._command import UNTIL_JOB, start_interpreter
from ._fork import open_pidfd
from ._hand_over import hand_over, hand_over_plain
from ._pickling import Pickled, is_plain, pickle_task
from ._prep import changes, foundations, refuse_while_importing, watched

_tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined, unused-ignore]


class Prepared(NamedTuple):
    """A task that is ready to be sent."""

    task: Task
    pickled: Pickled
    surroundings: dict[str, Any]


class RemoteLauncher:
    """The launcher for ``spawn`` and ``forkserver``."""

    def __init__(self, method: str, key: tuple[int, int]) -> None:
        self._method = method
        self._key = key
        # What was compared last, and what had changed.
        self._compared: tuple[Any, Any, dict[str, Any]] = (None, None, {})

    def prepare(self, task: Task) -> Prepared:
        """Pickle the task."""
        refuse_while_importing()
        return Prepared(task, pickle_task(task, self._method), watched())

    def launch(
        self, prepared: Prepared, lease: Optional[Lease], bell: int, stays: Optional[Stays]
    ) -> Flight:
        """Start a worker, and send it its task."""
        try:
            return self._launch(prepared, lease, bell, stays)
        except _zygote.ZygoteDied:
            # On another channel: what it may have forked finds that the first is closed.
            return self._launch(prepared, lease, bell, stays)

    def _launch(
        self, prepared: Prepared, lease: Optional[Lease], bell: int, stays: Optional[Stays]
    ) -> Flight:
        ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
        try:
            if self._method == "spawn":
                pid, pidfd, exit_status = _spawn(theirs)
            else:
                pid, pidfd, exit_status = _zygote.client().launch(theirs)
        except BaseException:
            _forking.close_socket(ours)
            raise
        finally:
            _forking.close_socket(theirs)
        ours.setblocking(False)
        told = None if stays is None else prepared.surroundings
        first = prepared.task.first
        flight = Flight(pid, pidfd, ours.fileno(), exit_status, ours, told, bell, first)
        try:
            with lifted():  # large arguments may take their time
                self._deliver(prepared, flight, lease, bell, stays)
        except BaseException:
            flight.kill()
            raise
        return flight

    def _deliver(
        self,
        prepared: Prepared,
        flight: Flight,
        lease: Optional[Lease],
        bell: int,
        stays: Optional[Stays],
    ) -> None:
        """Send the task. A worker that is gone already is the reactor's to find out."""
        if self._method == "forkserver":
            told = self._changes(prepared.surroundings, _zygote.client().known)
        else:
            told = {**prepared.surroundings, **foundations()}
        tracker = _tracker_fd()
        lease_fd, place = (-1, None) if lease is None else (lease.fileno(), lease.place)
        seat_fds = [fd for fd in (lease_fd, bell) if fd >= 0]
        head = pack_head(Head(self._key, place, lease_fd >= 0, bell >= 0, os.getpid(), told, stays))
        frame = encode(TASK, head, prepared.pickled.payload, lend=ASIDE)
        assert flight.sock is not None  # noqa: S101  # see `_launch`
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_job(flight.sock, [tracker, *seat_fds, *prepared.pickled.fds], frame)

    def _changes(self, now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        known, known_before, found = self._compared
        if known is not now or known_before is not before:
            found = changes(now, before)
            self._compared = now, before, found
        return found

    def hand_over(self, prepared: Prepared, lease: Lease, bell: int, worker: Flight) -> bool:
        """Send the task to a worker that waits for one."""
        task, pickled, surroundings = prepared
        if worker.first is not None and worker.first is task.first:
            pickled = pickle_task(task._replace(first=None), self._method)
        elif is_plain(task):
            (plain,) = pickled.payload
            return hand_over_plain(bytes(plain), surroundings, lease, bell, worker)
        return hand_over(pickled, surroundings, lease, bell, worker)


def _tracker_fd() -> int:
    """
    Return multiprocessing's resource tracker, started if it is not there.

    One for the whole tree, else a worker's would unlink what it made at its end. Its own way to
    see whether it is there is to write to it, which wakes it for each job; that nobody reads from a
    pipe any more is told by its other end, too.
    """
    fd: Optional[int] = _tracker._fd
    if fd is not None:
        poller = select.poll()
        poller.register(fd, 0)  # errors are reported in any case
        if not poller.poll(0):
            return fd
    # A fork must not find the tracker's own lock held, nor Ctrl-C leave a descriptor.
    tracker: Any = resource_tracker
    with deferred(), _forking.books_lock(), _forking.streams_held():
        return int(tracker.getfd())


def _spawn(theirs: socket.socket) -> tuple[int, int, Callable[[int, bool], Optional[int]]]:
    pid = start_interpreter("jobserver._worker._remote", [theirs.fileno()], UNTIL_JOB)
    return pid, open_pidfd(pid), child_exit_status
