# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The life of a fresh worker: run one job, finish everything, answer, end.

The answer is the last act. So the slot can go back as soon as the answer is here, and what is
left of the process is the kernel's to take down.
"""

from __future__ import annotations

import os
from typing import Any, Callable, NoReturn

from jobserver._slots._own import own_slot
from jobserver._wire import DIED, RETURNED, encode, send

from ._answer import Answer, answer_of, died
from ._process import finish_process, flush_streams


class Job:
    """
    One call, and the channel on which it is to be answered.

    Args:
        call: What to run; it has its arguments.
        channel: A blocking descriptor.
    """

    __slots__ = ("_call", "_channel", "_file")

    def __init__(self, call: Callable[[], Any], channel: int) -> None:
        self._call = call
        self._channel = channel
        self._file = os.fstat(channel).st_ino

    def work(self) -> NoReturn:
        """Run the job and answer. Ends the process, whatever happens."""
        me = os.getpid()
        answer = answer_of(self._call)
        if os.getpid() != me:
            # fn has forked and let the child return, too: only the original answers.
            flush_streams()
            os._exit(0)
        self._end(answer)

    def _end(self, answer: Answer) -> NoReturn:
        exitcode = 1
        try:
            try:
                finish_process()
            except BaseException as error:  # noqa: BLE001  # Ctrl-C while threads are being joined
                answer = died(error)
            exitcode = answer.exitcode
            flags = RETURNED if own_slot().returned() else 0
            pieces = encode(
                answer.kind, answer.text, answer.payload, flags=flags, exitcode=answer.exitcode
            )
            if self._is_open():
                send(self._channel, pieces)
            elif answer.kind != DIED:
                exitcode = 1
        except OSError:
            # Whoever was to have the answer is gone.
            exitcode = exitcode or 1
        finally:
            os._exit(exitcode)

    def _is_open(self) -> bool:
        # The job may have closed the channel, and opened another file under its number.
        try:
            return os.fstat(self._channel).st_ino == self._file
        except OSError:
            return False
