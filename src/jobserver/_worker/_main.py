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
from typing import TYPE_CHECKING, Any, Callable, NoReturn, Optional

from jobserver._slots._own import own_slot
from jobserver._wire import DIED, RETURNED, STAYS, UNTIL_CLOSED, UNTIL_TAKEN, encode, send

from ._answer import Answer, answer_of, died, end_copy
from ._process import finish_jobs, finish_process, flush_streams

if TYPE_CHECKING:
    from ._next import Next

_SO_COOKIE = 57  # asked for at half the cost of fstat


class Worker:
    """
    One process, and the channel on which its jobs are to be answered.

    Args:
        channel: A blocking descriptor.
        next_jobs: Where further jobs come from; None if the first is the last one.
    """

    __slots__ = ("_channel", "_cookie", "_file", "_next")

    def __init__(self, channel: int, next_jobs: Optional[Next]) -> None:
        self._channel = channel
        self._file = os.fstat(channel).st_ino
        self._cookie = b""
        self._next = next_jobs

    def work(self, call: Callable[[], Any]) -> NoReturn:
        """
        Run jobs and answer. Ends the process, whatever happens.

        Args:
            call: The first job; it has its arguments.
        """
        me = os.getpid()
        if self._next is not None:
            self._next.begin()
        while True:
            answer = answer_of(call)
            if os.getpid() != me:
                # fn has forked and let the child come back, too: only the original answers.
                end_copy(answer)
            self._answer(answer)
            del call, answer  # what they refer to is not to outlive the job
            assert self._next is not None  # noqa: S101  # else answering has ended the process
            call = self._next.job()

    def _answer(self, answer: Answer) -> None:
        """Finish the job and answer; returns only if the worker stays."""
        exitcode = 1
        stays = False
        try:
            try:
                stays = self._stays(answer)
                if not stays:
                    finish_process()
            except BaseException as error:  # noqa: BLE001  # Ctrl-C while threads are being joined
                answer, stays = died(error), False
            exitcode = answer.exitcode
            flags = (RETURNED if own_slot().returned() else 0) | (STAYS if stays else 0)
            pieces = encode(
                answer.kind,
                answer.text,
                answer.payload,
                flags=flags,
                exitcode=answer.exitcode,
                lend=UNTIL_TAKEN if stays else UNTIL_CLOSED,
            )
            if stays and self._next is not None:
                self._next.ready()
            if self._is_open():
                send(self._channel, pieces)
            else:
                stays = False
                exitcode = exitcode if answer.kind == DIED else 1
        except OSError:
            # Whoever was to have the answer is gone.
            stays = False
            exitcode = exitcode or 1
        except BaseException:
            stays = False
            raise
        finally:
            if not stays:
                os._exit(exitcode)

    def _stays(self, answer: Answer) -> bool:
        if self._next is None or answer.kind == DIED:
            return False
        finish_jobs()
        try:
            tidied = self._next.tidy()
        except Exception:  # noqa: BLE001  # the job has replaced os.environ, say
            return False
        if not tidied:
            return False
        flush_streams()
        return True

    def _is_open(self) -> bool:
        # The job may have closed the channel, and opened another file under its number.
        sock = None if self._next is None else self._next.sock
        try:
            if sock is None or not self._cookie:
                if os.fstat(self._channel).st_ino != self._file:
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
