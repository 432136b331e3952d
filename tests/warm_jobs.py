# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs for the tests of warm workers: what they leave behind, what they see, how they nest."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from helpers import PATIENCE, hard_exit, open_fds, soft_exit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from helpers import Gate

    from jobserver import Jobserver

kept: list[Any] = []


def answer_elsewhere(connection: Connection) -> None:
    """Put another socket in the place of each that is open here."""
    mine = connection.fileno()
    for fd in open_fds():
        if fd > 2 and fd != mine:
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    os.dup2(mine, fd)


def look() -> dict[str, Any]:
    """What a job finds around it."""
    return {
        "pid": os.getpid(),
        "environ": {k: v for k, v in os.environ.items() if k.startswith("JOBSERVER_T")},
        "dir": os.getcwd(),
        "path": list(sys.path),
        "argv": list(sys.argv),
    }


def make_a_mess(directory: str) -> dict[str, Any]:
    """Change the environment and the directory, then say what that looks like."""
    os.environ["JOBSERVER_T"] = "left behind"
    os.environ.pop("JOBSERVER_T_KEPT", None)
    os.chdir(directory)
    return look()


def remove_directory_below(directory: str) -> int:
    """Go where nothing is any more."""
    os.chdir(directory)
    os.rmdir(directory)
    return os.getpid()


def replace_environment() -> int:
    """Put a plain mapping in the place of os.environ."""
    os.environ = dict(os.environ)  # type: ignore[assignment]  # noqa: B003
    return os.getpid()


def do_nothing() -> None:
    """A plain preexec_fn."""


@contextlib.contextmanager
def wrap() -> Iterator[None]:
    """A context manager as preexec_fn."""
    yield


def leave_thread_pool() -> int:
    """Leave a pool of threads that are idle and end with the process only."""
    kept.append(ThreadPoolExecutor(1))
    return int(kept[-1].submit(os.getpid).result())


def leave_daemon() -> int:
    """Leave a daemon thread that never ends."""
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def leave_process() -> int:
    """Leave a process of multiprocessing's that ends later."""
    context = multiprocessing.get_context("fork")
    context.Process(target=threading.Event().wait, args=(0.1,)).start()
    return os.getpid()


def leave_fork(gate: Gate) -> int:
    """Leave a plain child of os.fork, which shares all descriptors."""
    if os.fork() == 0:
        try:
            gate.enter()
        finally:
            os._exit(0)
    gate.await_entered(1)
    return os.getpid()


def close_stdout() -> int:
    """Leave a stdout that is closed."""
    sys.stdout.close()
    return os.getpid()


def set_default_timeout() -> int:
    """Leave another default for new sockets."""
    import socket

    socket.setdefaulttimeout(0.05)
    return os.getpid()


def leave_open_end(connection: Connection) -> int:
    """Keep a connection for later jobs to use."""
    kept.append(connection)
    return os.getpid()


def fill_queue(queue: Any, size: int) -> int:
    """Leave much in a queue, to be sent by its thread; and the queue."""
    kept.append(queue)
    queue.put("x" * size)
    return os.getpid()


def use_lock(lock: Any) -> int:
    """Take a lock."""
    with lock:
        return os.getpid()


def receive_all(connections: list[Connection]) -> list[Any]:
    """What comes out of many pipes."""
    return [connection.recv() for connection in connections]


def count_fds(*args: Any) -> int:
    """How many descriptors this process has; keeps no argument."""
    return len(open_fds())


def raises(kind: type[BaseException]) -> None:
    """Raise."""
    raise kind("on purpose")


def pid_here_and_below(js: Jobserver) -> tuple[int, int]:
    """This process and that of a child."""
    return os.getpid(), js.submit(os.getpid).result(PATIENCE)


def use_and_close(js: Jobserver) -> tuple[int, int]:
    """The same, through a with-block of the job's own."""
    with js:
        return pid_here_and_below(js)


def tree(js: Jobserver, depth: int, consume: int, wait: float | None) -> int:
    """How many jobs there are from here down; each has two children."""
    if not depth:
        return 1
    args = (js, depth - 1, consume, wait)
    futures = [js.submit(tree, args=args), js.submit(tree, args=args, consume=consume)]
    counts: list[int] = []
    for future in futures:
        future.when_done(counts.append, 1)
    total = 1 + sum(future.result(wait) for future in futures)
    assert counts == [1, 1]
    return total


def starve(js: Jobserver, hungry: bool) -> int:
    """Wait for a child without a slot, which wants one for a child of its own."""
    kept.append(js)  # the reactor outlives the job
    return js.submit(starve_below, args=(js, hungry), consume=0).result()


def starve_below(js: Jobserver, hungry: bool) -> int:
    """Submit if hungry."""
    if hungry:
        return js.submit(os.getpid).result()
    threading.Event().wait(0.05)
    return 0


class Bomb:
    """Does something when it is pickled, or when it is unpickled."""

    def __init__(self, how: str, when: str, owner: int) -> None:
        self.how, self.when, self.owner = how, when, owner

    def __reduce__(self) -> tuple[Any, ...]:
        if self.when == "unpickling":
            return explode, (self.how,)
        if os.getpid() != self.owner:  # never in the test's own process
            explode(self.how)
        return Bomb, (self.how, self.when, self.owner)


def explode(how: str) -> None:
    """End badly."""
    if how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "os._exit":
        hard_exit(7)
    elif how == "sys.exit":
        soft_exit(7)
    raise LookupError("on purpose")


def set_off(how: str, when: str, owner: int) -> Any:
    """End badly in fn, or return what does so when pickled."""
    if when == "fn":
        explode(how)
    return Bomb(how, when, owner)


def swallow(bomb: Any) -> int:
    """Take an argument."""
    return os.getpid()


def leave_explosive(how: str) -> int:
    """Have the process end badly while it retires."""
    import multiprocessing.util

    multiprocessing.util.Finalize(None, explode, args=(how,), exitpriority=5)
    return os.getpid()


def pickled_size(value: Any) -> int:
    """How large a value has arrived."""
    return len(pickle.dumps(value))


def explode_later(how: str, gate: Gate) -> int:
    """Have a thread end the process badly once the gate is open."""

    def wait() -> None:
        gate.enter()
        explode(how)

    threading.excepthook = lambda *_: None
    threading.Thread(target=wait, daemon=True).start()
    gate.await_entered(1)
    return os.getpid()
