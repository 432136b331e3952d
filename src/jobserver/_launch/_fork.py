# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Fork a worker: nothing is pickled, nothing imported.

The child shares the parent's memory until either writes to a page of it, so the fewer objects the
child touches the cheaper it is: no Process object is started, no module loaded.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import contextlib
import os
import signal
import socket
import sys
from functools import partial
from multiprocessing import process
from time import thread_time
from typing import Any, NoReturn, Optional

from jobserver import _forking, _signals
from jobserver._callbacks import start_afresh
from jobserver._collapse import DEAR, forked
from jobserver._flight import Flight, child_exit_status
from jobserver._slots._lease import Lease
from jobserver._slots._own import OwnSlot, run_on
from jobserver._worker._main import Worker, work_once
from jobserver._worker._next import Next
from jobserver._worker._process import Identity, forget_program, leave_stdin, report
from jobserver._worker._stay import Habitat, Stays, variables
from jobserver._worker._task import Task, perform

from . import _births
from ._hand_over import hand_over, hand_over_plain
from ._pickling import is_plain, pickle_plain, pickle_task
from ._prep import watched

_process: Any = process

# Blocked it is pending whenever a child has ended.
_OF_CHILDREN = frozenset((signal.SIGCHLD,))


class ForkLauncher:
    """Launch each worker by ``os.fork``, for the pool of that key."""

    def __init__(self, key: tuple[int, int]) -> None:
        # What a job that fails needs: imported once here, not again by each child.
        import traceback  # noqa: F401

        self._key = key
        self._identity: Optional[Identity] = None

    def prepare(self, task: Task) -> Task:
        """Nothing to do: the child sees the parent's memory."""
        return task

    def launch(
        self, prepared: Task, lease: Optional[Lease], bell: int, stays: Optional[Stays]
    ) -> Flight:
        """Start a worker."""
        # In one piece, as each function that is called between two forks costs the copy of a page.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()  # else what is buffered would be written twice
            except (AttributeError, ValueError):  # there is none, or it is closed
                pass
        ours = told = next_jobs = None
        born = 0
        if stays is None or lease is None:
            reader, writer = _forking.open_pipe()
        else:
            born = _births.birth(prepared)
            told = watched()
            habitat = Habitat(variables(), told["dir"])
            ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
            reader, writer = ours.fileno(), theirs.detach()
            next_jobs = Next(writer, stays, habitat, lease.place, bell)
        epoch = _forking._epoch
        # All that the child can do without making, as what it writes to it must copy first.
        identity = self._identity
        if identity is None or not identity.holds(epoch):
            identity = self._identity = Identity(os.getpid(), epoch)
        number = next(_process._process_counter)
        lease_fd = -1 if lease is None else lease.fileno()
        mask = _signals.outside()
        began = thread_time()
        try:
            pid = _forking.fork((writer, lease_fd, bell))
            if pid == 0:
                own = OwnSlot(self._key, lease_fd, None if lease is None else lease.place, bell)
                _child(writer, next_jobs, prepared, identity, number, own, mask)
        except BaseException:
            if _forking._epoch != epoch:
                # An exception at the first instant of the child's life must not unwind the
                # parent's stack in it.
                os._exit(1)
            _forking.close(writer)
            _close(reader, ours)
            raise
        took = thread_time() - began
        _forking.close(writer)
        os.set_blocking(reader, False)
        try:
            pidfd = open_pidfd(pid)
        except BaseException:
            _close(reader, ours)
            raise
        flight = Flight(
            pid, pidfd, reader, child_exit_status, ours, told, bell, prepared.first, born
        )
        if _signal.sigpending() - _OF_CHILDREN:
            try:
                with _signals.lifted():
                    pass
            except BaseException:
                flight.kill()  # there is still time
                raise
        if took > DEAR:
            try:
                forked(took)
            except BaseException:  # out of a handler whose signal has come to another thread
                flight.kill()
                raise
        return flight

    def hand_over(self, prepared: Task, lease: Lease, bell: int, worker: Flight) -> bool:
        """Send the task to a worker that waits for one, if it can be pickled."""
        if _births.youth(prepared.fn, prepared.args) >= worker.born:
            return False
        if worker.first is not None and worker.first is prepared.first:
            prepared = prepared._replace(first=None)
        try:
            if is_plain(prepared):
                return hand_over_plain(
                    pickle_plain(prepared, "fork"), watched(), lease, bell, worker
                )
            pickled = pickle_task(prepared, "fork")
        except TypeError:
            return False  # a new worker is born with it, whatever it is
        return hand_over(pickled, watched(), lease, bell, worker)


def _close(reader: int, sock: Optional[socket.socket]) -> None:
    if sock is None:
        _forking.close(reader)
    else:
        _forking.close_socket(sock)


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
    channel: int,
    next_jobs: Optional[Next],
    task: Task,
    identity: Identity,
    number: int,
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
        call = partial(perform, *task)
        if next_jobs is None:
            work_once(channel, call)
        Worker(channel, next_jobs).work(call)
    except BaseException as error:  # noqa: BLE001  # KeyboardInterrupt before fn was called
        report(error)
    finally:
        os._exit(1)
