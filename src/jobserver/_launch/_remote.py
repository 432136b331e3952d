# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Launch workers that are not forked from this process: by spawn, or by the zygote."""

from __future__ import annotations

import os
import pickle
import socket
from multiprocessing import resource_tracker
from typing import Any, NamedTuple, Optional

from jobserver import _forking
from jobserver._fds import send_job
from jobserver._flight import Flight, Started, child_exit_status
from jobserver._signals import deferred
from jobserver._wire import ASIDE, TASK, encode
from jobserver._worker._stay import Stays
from jobserver._worker._task import Task

from . import _zygote
from ._command import UNTIL_JOB, start_interpreter
from ._fork import open_pidfd
from ._hand_over import hand_over
from ._pickling import Pickled, pickle_task
from ._prep import changes, foundations, refuse_while_importing, watched
from ._seat import Seat


class Prepared(NamedTuple):
    """A task that is ready to be sent."""

    task: Task
    pickled: Pickled
    surroundings: dict[str, Any]

    @property
    def first(self) -> Optional[object]:
        """What a worker is to run before its first job."""
        return self.task.first


class RemoteLauncher:
    """The launcher for ``spawn`` and ``forkserver``."""

    def __init__(self, method: str) -> None:
        self._method = method

    def prepare(self, task: Task) -> Prepared:
        """Pickle the task."""
        refuse_while_importing()
        return Prepared(task, pickle_task(task, self._method), watched())

    def launch(self, prepared: Prepared, seat: Seat, stays: Optional[Stays]) -> Started:
        """Start a worker, which then waits for ``deliver``."""
        ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
        try:
            if self._method == "spawn":
                started = _spawn(theirs, ours)
            else:
                started = _zygote.client().launch(theirs, ours)
        except BaseException:
            _forking.close_socket(ours)
            raise
        finally:
            _forking.close_socket(theirs)
        ours.setblocking(False)
        ours.detach()
        if stays is None:
            return started
        return started._replace(
            told=prepared.surroundings, stays=stays, bell=seat.bell, first=prepared.first
        )

    def deliver(self, prepared: Prepared, seat: Seat, started: Started) -> None:
        """Send the task. A worker that is gone already is the reactor's to find out."""
        told = dict(prepared.surroundings)
        if self._method == "forkserver":
            told = changes(told, _zygote.client().known)
        else:
            told.update(foundations())
        # One tracker for the whole tree, else a worker's would unlink what it made at its end.
        # A fork must not find the tracker's own lock held, nor Ctrl-C leave a descriptor.
        with deferred(), _forking.books_lock(), _forking.streams_held():
            tracker: Any = resource_tracker.getfd()
        seat_fds = [fd for fd in (seat.lease_fd, seat.bell) if fd >= 0]
        told["seat"] = (seat.key, seat.lease_fd >= 0, seat.place, seat.bell >= 0)
        told["parent_pid"] = os.getpid()
        told["stays"] = started.stays
        frame = encode(TASK, pickle.dumps(told), prepared.pickled.payload, lend=ASIDE)
        sock = None
        try:
            with deferred():  # else Ctrl-C could leave a descriptor that is nobody's
                sock = _forking.duplicate_socket(started.channel)
            send_job(sock, [tracker, *seat_fds, *prepared.pickled.fds], frame)
        except (BrokenPipeError, ConnectionResetError):
            return
        finally:
            if sock is not None:
                _forking.close_socket(sock)

    def hand_over(self, prepared: Prepared, seat: Seat, worker: Flight, *, fresh: bool) -> bool:
        """Send the task to a worker that waits for one."""
        pickled = prepared.pickled
        if worker.first is not None and worker.first is prepared.first:
            pickled = pickle_task(prepared.task._replace(first=None), self._method)
        return hand_over(pickled, prepared.surroundings, seat, worker, fresh=fresh)


def _spawn(theirs: socket.socket, ours: socket.socket) -> Started:
    pid = start_interpreter("jobserver._worker._remote", [theirs.fileno()], UNTIL_JOB)
    pidfd = open_pidfd(pid)
    return Started(pid, pidfd, ours.fileno(), lambda: child_exit_status(pidfd))
