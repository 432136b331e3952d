# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Launch workers that are not forked from this process: by spawn, or by the zygote."""

from __future__ import annotations

import os
import pickle
import socket
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

from jobserver import _forking
from jobserver._fds import send_all, send_fds
from jobserver._flight import Started, child_exit_status
from jobserver._wire import TASK, encode
from jobserver._worker._task import Task

from . import _zygote
from ._command import start_interpreter
from ._fork import open_pidfd
from ._pickling import Pickled, pickle_task
from ._prep import changes, foundations, refuse_while_importing, surroundings
from ._seat import Seat


class Prepared(NamedTuple):
    """A task that is ready to be sent."""

    pickled: Pickled
    surroundings: dict[str, Any]


class RemoteLauncher:
    """The launcher for ``spawn`` and ``forkserver``."""

    def __init__(self, method: str) -> None:
        self._method = method

    def prepare(self, task: Task) -> Prepared:
        """Pickle the task."""
        refuse_while_importing()
        return Prepared(pickle_task(task, self._method), surroundings())

    def launch(self, prepared: Prepared, seat: Seat) -> Started:  # noqa: ARG002
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
        return started

    def deliver(self, prepared: Prepared, seat: Seat, started: Started) -> None:
        """Send the task. A worker that is gone already is the reactor's to find out."""
        told = dict(prepared.surroundings)
        if self._method == "forkserver":
            told = changes(told, _zygote.client().known)
        else:
            told.update(foundations())
        # One tracker for the whole tree, else a worker's would unlink what it made at its end.
        with _forking.books_lock():  # a fork must not find the tracker's own lock held
            tracker: Any = resource_tracker.getfd()
        seat_fds = [fd for fd in (seat.lease_fd, seat.bell) if fd >= 0]
        told["seat"] = (seat.key, seat.lease_fd >= 0, seat.place, seat.bell >= 0)
        told["parent_pid"] = os.getpid()
        frame = encode(TASK, pickle.dumps(told), prepared.pickled.payload)
        sock = socket.socket(fileno=os.dup(started.channel))
        try:
            with sock:
                send_fds(sock, [tracker, *seat_fds, *prepared.pickled.fds])
                send_all(sock, frame)
        except (BrokenPipeError, ConnectionResetError):
            return


def _spawn(theirs: socket.socket, ours: socket.socket) -> Started:
    pid = start_interpreter("jobserver._worker._remote", [theirs.fileno()])
    pidfd = open_pidfd(pid)
    return Started(pid, pidfd, ours.fileno(), lambda: child_exit_status(pidfd))
