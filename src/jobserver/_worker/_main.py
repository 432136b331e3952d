# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The life of a worker: run a job, finish everything, answer, end; or wait for the next one.

The answer is the last act of a job. So the slot can go back as soon as the answer is here, and what
is left of a process that ends is the kernel's to take down.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from jobserver import _forking
from jobserver._slots._own import own_slot
from jobserver._wire import (
    DIED,
    RETURNED,
    STAYS,
    UNTIL_CLOSED,
    UNTIL_TAKEN,
    send_frame,
)

from ._answer import Answer, answer_of, died, end_copy
from ._process import finish_jobs, finish_process, flush_streams

if TYPE_CHECKING:
    from ._next import Next

_SO_COOKIE = 57  # asked for at half the cost of fstat
# By names of this module: what a fresh child looks up as an attribute costs it a page or two more.
_getpid, _fstat, _exit = os.getpid, os.fstat, os._exit


def work_once(channel: int, call: Callable[[], Any]) -> NoReturn:
    """
    Run one job, answer, and end the process, whatever happens.

    Args:
        channel: A blocking descriptor.
        call: The job; it has its arguments.
    """
    me, file = _getpid(), _fstat(channel).st_ino
    answer = answer_of(call)
    if _getpid() != me:
        # fn has forked and let the child come back, too: only the original answers.
        end_copy(answer)
    del call  # what it refers to is not to outlive the job
    _end(channel, file, answer)


def _end(channel: int, file: int, answer: Answer, *, finished: bool = False) -> NoReturn:
    """Finish everything, answer, and end the process."""
    exitcode = 1
    try:
        try:
            if not finished:
                finish_process()
        except BaseException as error:  # noqa: BLE001  # Ctrl-C while threads are being joined
            answer = died(error)
        kind, text, payload, exitcode = answer
        own = own_slot()
        flags = RETURNED if own.consumes and own.returned() else 0
        if _is_still(channel, file):
            send_frame(channel, kind, text, payload, flags, exitcode, UNTIL_CLOSED)
        else:
            exitcode = exitcode if kind == DIED else 1
    except OSError:
        # Whoever was to have the answer is gone.
        exitcode = exitcode or 1
    finally:
        _exit(exitcode)


def _is_still(channel: int, file: int) -> bool:
    # The job may have closed the channel, and opened another file under its number.
    try:
        return _fstat(channel).st_ino == file
    except OSError:
        return False


class Worker:
    """
    A process that may run several jobs, and the channel on which they are to be answered.

    Args:
        channel: A blocking descriptor.
        next_jobs: Where further jobs come from.
    """

    __slots__ = ("_channel", "_cookie", "_file", "_next")

    def __init__(self, channel: int, next_jobs: Next) -> None:
        self._channel = channel
        self._file = _fstat(channel).st_ino
        self._cookie = b""
        self._next = next_jobs

    def work(self, call: Callable[[], Any]) -> NoReturn:
        """
        Run jobs and answer. Ends the process, whatever happens.

        Args:
            call: The first job; it has its arguments.
        """
        me = _getpid()
        self._next.begin()
        while True:
            answer = answer_of(call)
            if _getpid() != me:
                end_copy(answer)
            del call  # what these refer to is not to outlive the job
            self._answer(answer)
            del answer
            call = self._next.job()

    def _answer(self, answer: Answer) -> None:
        """Finish the job and answer; returns only if the worker stays."""
        kind, text, payload, exitcode = answer
        try:
            finished = False
            stays = kind != DIED and self._tidied()
        except BaseException as error:  # noqa: BLE001  # Ctrl-C while jobs are waited for
            answer, finished, stays = died(error), True, False
        if not stays:
            _end(self._channel, self._file, answer, finished=finished)
        stays = False
        try:
            own = own_slot()
            flags = STAYS | RETURNED if own.consumes and own.returned() else STAYS
            self._next.ready()
            if self._is_open():
                send_frame(self._channel, kind, text, payload, flags, exitcode, UNTIL_TAKEN)
                stays = True
        except OSError:
            pass  # whoever was to have the answer is gone
        finally:
            if not stays:
                os._exit(exitcode or 1)

    def _tidied(self) -> bool:
        """Finish what the job has begun; False if its process must end for that."""
        if not _forking._stale:  # else it has submitted nothing
            finish_jobs()
        try:
            if not self._next.tidy():
                return False
        except Exception:  # noqa: BLE001  # the job has replaced os.environ, say
            return False
        flush_streams()
        return True

    def _is_open(self) -> bool:
        sock = self._next.sock
        try:
            if sock is None or not self._cookie:
                if not _is_still(self._channel, self._file):
                    return False
                if sock is not None:
                    self._cookie = _cookie(sock)
                return True
            return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8) == self._cookie
        except OSError:
            return False


def _cookie(sock: socket.socket) -> bytes:
    """Return the number that the kernel gives to this socket alone; empty if it gives none."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    except OSError:
        return b""
