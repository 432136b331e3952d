# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I stop a job that is already running?"""

from __future__ import annotations

import signal
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from jobserver import Future, Jobserver, SubmissionDied


def heedless(ready: Connection) -> None:
    """Work for ever and leave the signal to its default action: the end of the process."""
    ready.send("ready")
    while True:
        time.sleep(60)


def polite(ready: Connection) -> str:
    """Work until SIGTERM comes, then return what there is so far."""
    signal.signal(signal.SIGTERM, stop)
    try:
        ready.send("ready")
        while True:
            # Not for long: of a signal that comes just before it Python hears after it.
            time.sleep(0.1)
    except InterruptedError:
        return "partial result"


def stop(signum: int, _frame: object) -> None:
    """Break out of whatever the job is doing."""
    raise InterruptedError(signum)


def stubborn(ready: Connection) -> None:
    """Work for ever and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heedless(ready)


def cancel(future: Future[Any], grace: float) -> None:
    """Ask with SIGTERM, wait for at most the grace in seconds, then insist with SIGKILL."""
    if not future.wait(grace, signal=signal.SIGTERM):
        future.wait(signal=signal.SIGKILL)


def main(context: str | None = None) -> None:
    """Cancel three running jobs that take it in three ways."""
    with Jobserver(context, slots=1) as js:
        for fn, grace in ((heedless, 30.0), (polite, 30.0), (stubborn, 0.2)):
            receiver, sender = js.context.Pipe(duplex=False)
            with receiver, sender:
                future: Future[Any] = js(fn, sender)
                receiver.recv()  # From here on the job is in its loop.
                cancel(future, grace)
            try:
                print(f"{fn.__name__}: returned {future.result()!r}")
            except SubmissionDied as death:
                print(f"{fn.__name__}: died with exitcode {death.exitcode}")


if __name__ == "__main__":
    main(*sys.argv[1:])
