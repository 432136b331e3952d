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


def work(call: Callable[[], Any], channel: int) -> NoReturn:
    """Run a job and answer on ``channel``. Ends the process, whatever happens."""
    me = os.getpid()
    identity = _identity(channel)
    answer = answer_of(call)
    if os.getpid() != me:
        # fn has forked and let the child return, too: only the original answers.
        flush_streams()
        os._exit(0)
    end(answer, channel, identity)


def end(answer: Answer, channel: int, identity: tuple[int, int]) -> NoReturn:
    """Finish everything, send the answer, end."""
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
        # The job may have closed the channel, and opened another file under its number.
        if _identity(channel) == identity:
            send(channel, pieces)
        elif answer.kind != DIED:
            exitcode = 1
    except OSError:
        # Whoever was to have the answer is gone, or has closed the channel.
        exitcode = exitcode or 1
    finally:
        os._exit(exitcode)


def _identity(fd: int) -> tuple[int, int]:
    try:
        status = os.fstat(fd)
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino
