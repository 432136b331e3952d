# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Make a fresh process look to its job as multiprocessing's own would.

``current_process()``, ``parent_process()``, finalizers, after-fork hooks, a stdin that is
/dev/null: libraries rely on them. All objects are made in the parent, before the fork
(``Identity``), and steps that have nothing to do are left out: a page that a fresh child writes to,
and be it for a reference count, costs a page fault.
"""

from __future__ import annotations

import atexit
import gc
import io
import itertools
import os
import signal
import sys
import threading
from multiprocessing import process, util
from typing import Any, Callable

from jobserver import _forking

NAME = "Jobserver-worker"

# By names of this module: what a fresh child looks up as an attribute costs it a page or two more.
_open, _close, _dup2 = os.open, os.close, os.dup2
_freeze = gc.freeze
_clear_exit_handlers, _set_wakeup_fd = atexit._clear, signal.set_wakeup_fd

_process: Any = process
_util: Any = util
_threading: Any = threading
_set_variables = _process.__dict__.update
_finalizers: dict[Any, Any] = _util._finalizer_registry
_after_forkers: dict[Any, Any] = _util._afterfork_registry.data


class WorkerProcess(process.BaseProcess):
    """What ``multiprocessing.current_process()`` returns in a worker."""


class _Parent(_process._ParentProcess):  # type: ignore[misc]
    """What ``multiprocessing.parent_process()`` returns in a worker."""

    @property
    def _sentinel(self) -> int:
        # Readable once the parent is gone, as a pidfd is; opened when it is first asked for.
        if self.__dict__.get("_pidfd") is None:
            self.__dict__["_pidfd"] = os.pidfd_open(self._pid)
        return int(self.__dict__["_pidfd"])

    @_sentinel.setter
    def _sentinel(self, sentinel: int) -> None:
        pass


class _NoInput(io.TextIOWrapper):
    """A stdin at its end, without a descriptor to be opened for it in each worker."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def fileno(self) -> int:
        return 0


_NO_INPUT = _NoInput()


class Identity:
    """
    Who workers will be; made once, by who forks them, for all of them.

    Args:
        parent_pid: What is to be their parent; see ``set_parent``.
        epoch: Tells the process that makes this from those forked from it.
    """

    def __init__(self, parent_pid: int, epoch: int = 0) -> None:
        parent = _process._current_process
        self._of = parent, parent._name, dict(parent._config), epoch
        me: Any = WorkerProcess(name=NAME)
        _process._dangling.discard(me)  # it is not one that somebody has forgotten to join
        me._parent_pid = parent_pid
        me._parent_name = parent.name
        me._config.pop("daemon", None)
        theirs = _Parent(parent.name, parent_pid, -1)
        self._parts = me, theirs
        self._variables = {
            "_process_counter": itertools.count(1),
            "_children": set(),
            "_current_process": me,
            "_parent_process": theirs,
        }

    def holds(self, epoch: int) -> bool:
        """Say whether it still is what would be made now."""
        parent = _process._current_process
        return self._of == (parent, parent._name, parent._config, epoch)

    def set_parent(self, pid: int) -> None:
        """State whose children they will be, from now on."""
        me, parent = self._parts
        me._parent_pid = parent._pid = pid

    def assume(self, *, forked: bool, number: int = 0) -> None:
        """
        In the worker: be that process.

        Args:
            forked: Not started as an interpreter of its own.
            number: Tells it from the others, as multiprocessing counts them; 0 for the first.
        """
        if number:
            self._parts[0]._identity = (*_process._current_process._identity, number)
            # What is frozen is not traversed by the collector, so its pages stay shared. A zygote
            # has done that for all of its workers.
            _freeze()
        _set_variables(self._variables)
        if forked and _after_forkers:
            _util._run_after_forkers()


def forget_program() -> None:
    """In a process forked from the program, or in a zygote for all of its workers."""
    _clear_exit_handlers()  # those of the program are the program's
    try:
        _set_wakeup_fd(-1)  # the program's event loop must not hear of our signals
    except ValueError:
        pass  # not the main thread
    if _finalizers:
        _finalizers.clear()


def leave_stdin() -> None:
    """In a process forked from the program: leave its input to that."""
    if sys.stdin is None:
        return  # the program may have another file under its number
    closed = getattr(sys.stdin, "closed", False)
    sys.stdin = _NO_INPUT  # first, as the end of what it was may close the descriptor
    if closed:
        return  # likewise
    null = _open("/dev/null", 0)
    if null:
        _dup2(null, 0)  # inheritable
        _close(null)
    else:
        os.set_inheritable(0, True)


def shut_stdin() -> None:
    """In an interpreter that was started for workers, whatever importing main has made of it."""
    _util._close_stdin()
    leave_stdin()


def finish_jobs() -> None:
    """Wait for the jobs that this process has submitted."""
    ending = sys.modules.get("jobserver._ending")
    if ending is not None:
        ending.finish_jobs()


def finish_process() -> None:
    """Finish everything that the job has begun in this process, as its end would."""
    if not _forking._stale:  # else it has submitted nothing
        finish_jobs()
    # Threads and hooks may submit more, so jobs are waited for after each of them.
    if len(_threading._active) > 1 or _threading._limbo:
        _finish(_threading._shutdown)
    if _finalizers or _process._children:
        _finish(_util._exit_function)
    if atexit._ncallbacks():
        _finish(atexit._run_exitfuncs)
    flush_streams()


def _finish(step: Callable[[], None]) -> None:
    try:
        step()
    except Exception as error:  # noqa: BLE001  # no reason to lose the answer
        report(error)
    finish_jobs()


def report(error: BaseException) -> None:
    """Print what can be told to nobody else."""
    sys.excepthook(type(error), error, error.__traceback__)


def flush_streams() -> None:
    """Flush stdout and stderr, which the job may have closed or replaced."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            pass
