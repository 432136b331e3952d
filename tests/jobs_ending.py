# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs that end badly, or leave something behind."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from helpers import open_fds, touch, wait_until

if TYPE_CHECKING:
    from helpers import Gate

    from jobserver import Jobserver


def exec_program(command: list[str]) -> None:
    """Become another program."""
    os.execv(command[0], command)


def ignoring_signals(gate: Gate) -> None:
    """Stand at the gate, deaf to polite signals."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    gate.enter()


def close_descriptors(first: int, gate: Gate | None = None) -> str:
    """Close every descriptor from a number on, then run on."""
    os.closerange(first, 4096)
    if gate is not None:
        gate.enter()
    return "closed"


def close_streams(how: str) -> str:
    """Make stdout and stderr unusable, with text still buffered."""
    sys.stdout.write("")
    if how == "object":
        sys.stdout.close()
        sys.stderr.close()
    elif how == "descriptor":
        os.close(1)
        os.close(2)
    elif how == "none":
        setattr(sys, "stdout", None)  # noqa: B010
        setattr(sys, "stderr", None)  # noqa: B010
    else:
        reader, writer = os.pipe()
        os.close(reader)
        # Whatever is flushed into this pipe at the end fails.
        sys.stdout = os.fdopen(writer, "w")
        sys.stdout.write("nobody reads this")
    return "closed"


def grandchild(gate: Gate, path: str, answer: str) -> str:
    """Leave a process at the gate that holds all that this one holds; then answer, or die."""
    child = os.fork()
    if child == 0:
        try:
            gate.enter()
        finally:
            os._exit(0)
    gate.await_entered(1)
    with open(path, "w") as stream:
        stream.write(str(child))
    if answer == "die":
        os._exit(23)
    return answer


def run_daemon_thread() -> str:
    """Leave a busy daemon thread."""

    def spin() -> None:
        while True:
            time.sleep(0.001)

    threading.Thread(target=spin, daemon=True).start()
    return "left a daemon"


def stop_other_threads_from_finishing(gate: Gate) -> str:
    """Leave a thread, not a daemon, that stands at the gate."""
    thread = threading.Thread(target=gate.enter)
    thread.start()
    gate.await_entered(1)
    return "never seen"


def change_directory(path: str) -> str:
    """Go elsewhere."""
    os.chdir(path)
    return os.getcwd()


def change_much(path: str) -> None:
    """Change what belongs to the process."""
    import socket

    os.chdir(path)
    os.umask(0o177)
    os.nice(3)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.environ["JOBSERVER_T"] = "left behind"
    sys.path.insert(0, "left behind")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    socket.setdefaulttimeout(5)


def look_around() -> list[Any]:
    """What change_much changes."""
    import socket

    mask = os.umask(0)
    os.umask(mask)
    return [
        os.getcwd(),
        mask,
        os.nice(0),
        resource.getrlimit(resource.RLIMIT_CORE),
        resource.getrlimit(resource.RLIMIT_NOFILE),
        os.environ.get("JOBSERVER_T"),
        "left behind" in sys.path,
        signal.getsignal(signal.SIGUSR1),
        socket.getdefaulttimeout(),
    ]


# For the end of programs


def slow_touch(begun: str, done: str) -> None:
    """Tell of the beginning, take a moment, tell of the end."""
    touch(begun)
    time.sleep(0.3)
    touch(done)


def leave_child(js: Jobserver, begun: str, done: str) -> str:
    """Start a job and return without waiting for it."""
    js.submit(slow_touch, args=(begun, done))
    wait_until(lambda: os.path.exists(begun), "the child to begin")
    return "left"


def inheritable() -> list[str]:
    """What the descriptors beyond stderr refer to that a command of this process would get."""
    found = []
    for fd, name in open_fds().items():
        with contextlib.suppress(OSError):  # the descriptor that has listed them
            if fd > 2 and os.get_inheritable(fd):
                found.append(name)
    return found


def inheritable_below(js: Jobserver) -> list[str]:
    """The same here and, submitted with consume=0, in a job of this job."""
    below = js.submit(inheritable, consume=0).result()
    return [*inheritable(), *below]


def fork_and_end(how: str) -> int:
    """Fork, end the child in the way named; the status that its parent sees."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if how == "exit":
        sys.exit(4)
    if how == "raise":
        raise LookupError("of the child")
    return 0
