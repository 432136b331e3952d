# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Run in a zygote what each of its workers is going to run.

The interpreter specialises code that has run some times, and caches which attributes it has found.
What it writes for that in a fresh child is copied first, page by page, for each job again; what has
been written before the fork is there.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
from functools import partial
from typing import Callable, Optional

from jobserver import _forking
from jobserver._fds import send_job
from jobserver._wire import RESULT, TASK, UNTIL_CLOSED, encode, send_frame

from ._answer import answer_of
from ._next import load, receive_job
from ._protocol import Head, pack_head, unpack_head
from ._task import Task, perform

# More often than any interpreter waits before it specialises.
_TIMES = 20


def rehearse() -> None:
    """
    Receive jobs from this very process, run them, and answer, some times.

    To be called while there is one thread: what ``threading`` does after a fork then changes
    nothing. Nor does anything else of it concern what importing main may have left here.
    """
    after_fork: Optional[Callable[[], None]] = getattr(threading, "_after_fork", None)
    ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
    reader, writer = os.pipe()
    try:
        for _ in range(_TIMES):
            if after_fork is not None:
                after_fork()  # a third of what a forked child writes to, and harmless: see above
            task = Task(_nothing, (), {}, {}, None)
            head = Head((0, 0), (0, 0), True, False, 0, {}, None)
            frame = encode(TASK, pack_head(head), [pickle.dumps(tuple(task))])
            send_job(ours, [writer, writer], frame)
            received, fds = receive_job(theirs, b"", [])
            for fd in fds:
                os.close(fd)
            unpack_head(received.segments[0])
            answer = answer_of(partial(perform, *load(received)))
            kind, text_of, payload, exitcode = answer
            assert kind == RESULT  # noqa: S101
            send_frame(writer, kind, text_of, payload, 0, exitcode, UNTIL_CLOSED)
            os.read(reader, 1 << 16)
    finally:
        _forking.close_socket(ours)
        _forking.close_socket(theirs)
        os.close(reader)
        os.close(writer)


def _nothing() -> None:
    pass
