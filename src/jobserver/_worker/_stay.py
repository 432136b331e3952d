# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What a worker that stays does between two jobs: tidy up, answer, wait.

Guarantees:

* The environment and the working directory that the next job finds are those of whoever submits
  it. What cannot be undone (a plain ``preexec_fn``) ends the worker.
* A job is over when its nested jobs, its threads and its finalizers are, as in a fresh worker: what
  it leaves behind of these, or a child process, ends the worker, as nothing but the end of a
  process finishes them all (a thread pool's idle threads end by nothing else). Daemon threads run
  on, and exit handlers are called at the end of the worker.
* The worker ends when its owner does: then its channel is at its end.
"""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing import process, util
from typing import Any, NamedTuple, Optional

# How many seconds a worker waits for its next job before it ends.
IDLE = 60.0

_process: Any = process
_util: Any = util
_threading: Any = threading

_spoiled = False
_here: Optional[Habitat] = None


def accept() -> None:
    """Let the next jobs find this process as it is now."""
    if _here is not None:
        _here.accept()


def tidy() -> bool:
    """Undo what a job has left that was not the last one; False if that cannot be."""
    return _here is not None and _here.tidy()


def inhabit(habitat: Habitat) -> None:
    """In a worker that stays: state what its jobs are to find."""
    global _here  # noqa: PLW0603
    _here = habitat


class Stays(NamedTuple):
    """
    How long a worker may stay.

    Args:
        tasks: How many jobs it may run in all; None for any number.
        idle: How many seconds it waits for the next one.
    """

    tasks: Optional[int]
    idle: float


def spoil() -> None:
    """The job has changed its process for good: it is to be the last one here."""
    global _spoiled  # noqa: PLW0603
    _spoiled = True


class Habitat:
    """
    What every job in this process is to find.

    Args:
        environ: The variables of the environment, encoded, as ``os.environ`` keeps them.
        directory: The working directory; empty until it is known.
    """

    def __init__(self, environ: dict[bytes, bytes], directory: str) -> None:
        self._environ = environ
        self._directory = directory
        self._residents: set[Any] = set()  # threads and finalizers that are no job's

    def tidy(self) -> bool:
        """Undo what the job has left; False if that cannot be, so that this worker is to end."""
        if not self._directory:
            return False  # nothing could be made ready here for any job
        threads = len(_threading._active) > 1 or _threading._limbo
        perhaps = threads or _process._children or _util._finalizer_registry
        if _spoiled or (perhaps and self._unfinished()):
            return False
        if getattr(sys.stdout, "closed", False) or getattr(sys.stderr, "closed", False):
            return False
        environ: Any = os.environ
        if environ._data != self._environ:
            self._restore_environ()
        try:
            if os.getcwd() == self._directory:
                return True
        except OSError:
            pass  # the job was in a directory that is gone
        try:
            os.chdir(self._directory)
        except OSError:
            return False
        return True

    def _restore_environ(self) -> None:
        environ: Any = os.environ
        for name in [name for name in environ._data if name not in self._environ]:
            del os.environb[name]
        for name, value in self._environ.items():
            if environ._data.get(name) != value:
                os.environb[name] = value

    def change(self, changes: dict[str, Any]) -> None:
        """Become like the submitting process in what has changed there."""
        if "environ" in changes:
            self._environ = changes["environ"]
            self._restore_environ()
        if "dir" in changes:
            self._directory = changes["dir"]
            os.chdir(self._directory)
        if "sys_path" in changes:
            sys.path[:] = changes["sys_path"]
        if "sys_argv" in changes:
            sys.argv[:] = changes["sys_argv"]
        if "authkey" in changes:
            process.current_process().authkey = changes["authkey"]

    def accept(self) -> None:
        """Let what has been done to this process be as it is."""
        self._environ, self._directory = variables(), os.getcwd()
        self._residents = {*threading.enumerate(), *_util._finalizer_registry}

    def _unfinished(self) -> bool:
        """Say whether there is something that the end of a process would wait for, or do."""
        if _process._children:
            return True
        for key in _util._finalizer_registry:
            if key[0] is not None and key not in self._residents:
                return True
        return any(
            not (thread.daemon or thread is threading.main_thread() or thread in self._residents)
            for thread in threading.enumerate()
        )


def variables() -> dict[bytes, bytes]:
    """Return the variables of the environment, encoded."""
    environ: Any = os.environ
    return dict(getattr(environ, "_data", environ))  # else the program has replaced it
