# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Fork a worker: nothing is pickled, nothing imported.

The child shares the parent's memory until either writes to a page of it, so the fewer objects the
child touches the cheaper it is: no Process object is started, no module loaded.
"""

from __future__ import annotations

import os
from multiprocessing import util
from typing import Any, NoReturn

from jobserver import _forking, _signals
from jobserver._callbacks import start_afresh
from jobserver._flight import Started, child_exit_status
from jobserver._slots._own import OwnSlot, run_on
from jobserver._worker._main import Job
from jobserver._worker._process import Identity, report
from jobserver._worker._task import Task

from ._seat import Seat


class ForkLauncher:
    """Launch each worker by ``os.fork``."""

    def prepare(self, task: Task) -> Task:
        """Nothing to do: the child sees the parent's memory."""
        return task

    def launch(self, prepared: Task, seat: Seat) -> Started:
        """Start a worker."""
        flush: Any = util
        flush._flush_std_streams()  # else what is buffered would be written twice
        reader, writer = _forking.open_pipe()
        parent = os.getpid()
        # All that the child can do without making, as what it writes to it must copy first.
        identity = Identity(parent)
        own = OwnSlot(seat.key, seat.lease_fd, seat.place, seat.bell)
        job = Job(prepared.run, writer)
        mask = _signals.outside()
        pid = -1
        try:
            pid = _forking.fork(seat.fds() | {writer})
            if pid == 0:
                _child(job, identity, own, mask)
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
        return Started(pid, pidfd, reader, lambda: child_exit_status(pidfd))

    def deliver(self, prepared: Task, seat: Seat, started: Started) -> None:
        """Nothing to do: the worker was born with its task."""


def open_pidfd(pid: int) -> int:
    """Open a pidfd of a child; -1 when other code has already reaped it."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    except BaseException:
        # No descriptor to watch it by: the job has not been accepted, so it must not run on.
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise


def _child(job: Job, identity: Identity, own: OwnSlot, mask: Any) -> NoReturn:
    try:
        start_afresh()
        run_on(own)
        identity.assume(forked=True)
        _signals.restore(mask)
        job.work()
    except BaseException as error:  # noqa: BLE001  # KeyboardInterrupt before fn was called
        report(error)
    finally:
        os._exit(1)
