# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I make sure that no worker outlives a program that was killed?"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from jobserver import Jobserver

PR_SET_PDEATHSIG = 1  # From <linux/prctl.h>.


def die_with_parent(parent: int | None) -> None:
    """Have the kernel SIGKILL this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # The kernel says nothing about a parent that had already died before the call above.
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def work_for_ever(alive: Connection) -> None:
    """Say that the work began and then hold the connection open for as long as we live."""
    alive.send("began")
    while True:
        time.sleep(60)


def program(context: str | None, alive: Connection) -> None:
    """Stand for your program: one long job, and no chance to clean up."""
    js = Jobserver(context, slots=1)
    # Under forkserver the parent of a worker is not this process but the server that forks.
    forkserver = js.context.get_start_method() == "forkserver"
    guard = functools.partial(die_with_parent, None if forkserver else os.getpid())
    js.submit(work_for_ever, args=(alive,), preexec_fn=guard).result()


def main(context: str | None = None) -> None:
    """Kill a program with SIGKILL and see its worker go, too."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=program, args=(context, sender))
    process.start()
    sender.close()
    print("worker:", receiver.recv())

    process.kill()
    process.join()
    # End of file means that nobody holds the other end any more: the worker is dead as well.
    assert receiver.poll(30), "the worker outlived its program"
    try:
        receiver.recv()
    except EOFError:
        print("worker: gone with its program")


if __name__ == "__main__":
    main(*sys.argv[1:])
