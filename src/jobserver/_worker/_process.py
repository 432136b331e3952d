# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Make a fresh process look to its job as multiprocessing's own would.

``current_process()``, ``parent_process()``, finalizers, after-fork hooks, a stdin that is
/dev/null: libraries rely on them.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
from multiprocessing import process, util
from typing import Any

NAME = "Jobserver-worker"


class WorkerProcess(process.BaseProcess):
    """What ``multiprocessing.current_process()`` returns in a worker."""

    def __init__(self, parent: process.BaseProcess, parent_pid: int) -> None:
        super().__init__(name=NAME)
        state: Any = self
        state._parent_pid = parent_pid
        state._parent_name = parent.name


def become_worker(parent_pid: int, *, forked: bool) -> None:
    """Set up multiprocessing's view of this process."""
    # What was frozen is not traversed by the collector, so its pages stay shared with the parent.
    gc.freeze()
    state: Any = process
    parent = state._current_process
    me: Any = WorkerProcess(parent, parent_pid)
    me._config.pop("daemon", None)
    state._process_counter = itertools.count(1)
    state._children = set()
    state._current_process = me
    state._parent_process = state._ParentProcess(parent.name, parent_pid, _sentinel(parent_pid))
    if forked:
        atexit._clear()  # those of the parent are the parent's
        with contextlib.suppress(ValueError):  # not the main thread: the parent's wakeup fd
            signal.set_wakeup_fd(-1)
        hooks: Any = util
        hooks._finalizer_registry.clear()
        hooks._run_after_forkers()
        hooks._close_stdin()


def _sentinel(pid: int) -> int:
    # parent_process().is_alive() and join() wait on a descriptor that is readable once the parent
    # is gone: a pidfd is just that.
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def finish_process() -> None:
    """Finish everything that the job has begun in this process, as its end would."""
    _threading: Any = threading
    _util: Any = util
    jobs = sys.modules.get("jobserver._ending")
    finish_jobs = (lambda: None) if jobs is None else jobs.finish_jobs
    # Threads, and hooks, may have submitted more.
    for step in (
        finish_jobs,
        _threading._shutdown,
        finish_jobs,
        _util._exit_function,
        atexit._run_exitfuncs,
        finish_jobs,
    ):
        try:
            step()
        except Exception as error:  # noqa: BLE001  # no reason to lose the answer
            report(error)
    flush_streams()


def report(error: BaseException) -> None:
    """Print what can be told to nobody else."""
    sys.excepthook(type(error), error, error.__traceback__)


def flush_streams() -> None:
    """Flush stdout and stderr, which the job may have closed or replaced."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()
