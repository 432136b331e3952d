# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Return the tokens of an outer pool when the process that has joined it is killed.

Berths are in memory that the kernel frees with their last opener. In a pool of our own nobody would
miss the tokens then. But those of an outer make are to go back, and a process that has been killed
cannot do that. So one that outlives it has the berths open as well, and sleeps until the pipe that
the other holds is at its end. It then sweeps until no token is left in a berth: those of workers
that run on are theirs until they end.

It is started when the first token is taken, as an interpreter that imports next to nothing, and
not as a child of the process that it cares for, which may be waiting for *its* children.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

# How many seconds between two looks whether a worker that has outlived its submitter has ended.
_PAUSE = 0.05
_OPEN_FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC


def start(pipe: int, berths: list[int]) -> int:
    """
    Start a janitor; returns the descriptor by whose end it knows that this process has ended.

    Raises:
        OSError: There is no process or descriptor left for it.
    """
    from multiprocessing import spawn, util

    from jobserver import _forking

    life, ours = _forking.open_pipe()
    try:
        words = [spawn.get_executable(), "-I", "-S", __file__, *map(str, (life, pipe, *berths))]
        executable = os.fsencode(words[0])
        with _forking.streams_held():
            pid = util.spawnv_passfds(  # type: ignore[attr-defined, unused-ignore]
                executable, [os.fsencode(word) for word in words], [life, pipe, *berths]
            )
        # It forks at once, and the fork is the one that stays.
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # somebody else has reaped it
    except OSError:
        _forking.close(ours)
        raise
    finally:
        _forking.close(life)
    return ours


def main(life: int, pipe: int, berths: list[int]) -> None:
    """Wait for the end of the other process, then sweep."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from _splice import move_byte, waiting_bytes  # type: ignore[import-not-found]

    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.read(life, 1)
    while any(waiting_bytes(berth) for berth in berths):
        for berth in berths:
            fd = os.open(f"/proc/self/fd/{berth}", _OPEN_FLAGS)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                move_byte(fd, pipe)
            except BlockingIOError:
                pass  # in use, or empty
            finally:
                os.close(fd)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), [int(word) for word in sys.argv[3:]])
