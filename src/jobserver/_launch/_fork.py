# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Fork a worker: nothing is pickled, nothing imported.

The child shares the parent's memory until either writes to a page of it, so the fewer objects the
child touches the cheaper it is: no Process object is started, no module loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
from multiprocessing import util
from typing import Any, NoReturn, Optional

from jobserver import _forking, _signals
from jobserver._callbacks import start_afresh
from jobserver._flight import Flight, Started, child_exit_status
from jobserver._slots._own import OwnSlot, run_on
from jobserver._worker._main import Worker
from jobserver._worker._next import Next
from jobserver._worker._process import Identity, forget_program, leave_stdin, report
from jobserver._worker._stay import Habitat, Stays, variables
from jobserver._worker._task import Task

from . import _births
from ._hand_over import hand_over
from ._pickling import pickle_task
from ._prep import watched
from ._seat import Seat


class ForkLauncher:
    """Launch each worker by ``os.fork``."""

    def __init__(self) -> None:
        # What a job that fails needs: imported once here, not again by each child.
        import traceback  # noqa: F401

        self._identity: Optional[Identity] = None

    def prepare(self, task: Task) -> Task:
        """Nothing to do: the child sees the parent's memory."""
        return task

    def launch(self, prepared: Task, seat: Seat, stays: Optional[Stays]) -> Started:
        """Start a worker."""
        flush: Any = util
        flush._flush_std_streams()  # else what is buffered would be written twice
        if stays is None:
            reader, writer = _forking.open_pipe()
        else:
            ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
            reader, writer = ours.detach(), theirs.detach()
        parent = os.getpid()
        # All that the child can do without making, as what it writes to it must copy first.
        identity = self._identity
        if identity is None or not identity.holds(parent):
            identity = self._identity = Identity(parent)
        number = identity.numbered()
        own = OwnSlot(seat.key, seat.lease_fd, seat.place, seat.bell)
        told = next_jobs = None
        born = 0
        if stays is not None:
            born = _births.birth(prepared)
            told = watched()
            habitat = Habitat(variables(), told["dir"])
            next_jobs = Next(writer, stays, habitat, seat.place, seat.bell)
        worker = Worker(writer, next_jobs)
        mask = _signals.outside()
        pid = -1
        try:
            pid = _forking.fork(seat.fds() | {writer})
            if pid == 0:
                _child(worker, prepared, identity, number, own, mask)
        except BaseException:
            if os.getpid() != parent:
                # An exception at the first instant of the child's life must not unwind the
                # parent's stack in it.
                os._exit(1)
            _forking.close(reader)
            raise
        finally:
            if os.getpid() == parent:
                _forking.close(writer)
        os.set_blocking(reader, False)
        try:
            pidfd = open_pidfd(pid)
        except BaseException:
            _forking.close(reader)
            raise
        return Started(
            pid,
            pidfd,
            reader,
            lambda: child_exit_status(pidfd),
            told,
            stays,
            seat.bell,
            prepared.first,
            born,
        )

    def deliver(self, prepared: Task, seat: Seat, started: Started) -> None:
        """Nothing to do: the worker was born with its task."""

    def hand_over(self, prepared: Task, seat: Seat, worker: Flight, *, fresh: bool) -> bool:
        """Send the task to a worker that waits for one, if it can be pickled."""
        if _births.younger(prepared, worker.born):
            return False
        if worker.first is not None and worker.first is prepared.first:
            prepared = prepared._replace(first=None)
        try:
            pickled = pickle_task(prepared, "fork")
        except TypeError:
            return False  # a new worker is born with it, whatever it is
        return hand_over(pickled, watched(), seat, worker, fresh=fresh)


def open_pidfd(pid: int) -> int:
    """Open a pidfd of a child; -1 when other code has already reaped it."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    except BaseException:
        # No descriptor to watch it by: the job has not been accepted, so it must not run on.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):  # reaped by other code
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        raise


def _child(
    worker: Worker,
    task: Task,
    identity: Identity,
    number: tuple[int, ...],
    own: OwnSlot,
    mask: Any,
) -> NoReturn:
    try:
        start_afresh()
        run_on(own)
        forget_program()
        leave_stdin()
        identity.assume(forked=True, number=number)
        _signals.restore(mask)
        worker.work(task.run)
    except BaseException as error:  # noqa: BLE001  # KeyboardInterrupt before fn was called
        report(error)
    finally:
        os._exit(1)
