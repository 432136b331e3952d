# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Job functions and utilities that the tests share.

Everything that travels to a worker is a module-level function or a picklable class, so that the
same case runs under fork, spawn and forkserver. Every worker imports this, so what only tests need
is imported late.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

METHODS = ("fork", "spawn", "forkserver")

#: Seconds after which a test gives up on something that should take milliseconds.
PATIENCE = 20.0


# Waiting without guessing


def wait_until(predicate: Callable[[], object], what: str = "condition") -> None:
    """Poll until predicate() is true; AssertionError after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    pause = 0.001
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"gave up after {PATIENCE} s waiting for {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


class Gate:
    """A door between processes, made of files: jobs enter and stay until the test opens it.

    Plain files work the same for every start method and for grandchildren, and a job that nobody
    releases gives up by itself after PATIENCE seconds.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    def enter(self) -> int:
        """Announce this process, stay until the gate is open, return this process's id."""
        pid = os.getpid()
        touch(os.path.join(self.directory, f"in.{pid}"))
        wait_until(self.is_open, "the gate to open")
        return pid

    def entered(self) -> list[int]:
        """Ids of the processes that have come so far."""
        names = os.listdir(self.directory)
        return sorted(int(name[3:]) for name in names if name.startswith("in."))

    def await_entered(self, count: int) -> list[int]:
        """Wait until count processes have come; their ids."""
        wait_until(lambda: len(self.entered()) >= count, f"{count} jobs at the gate")
        return self.entered()

    def is_open(self) -> bool:
        """Whether jobs may pass."""
        return os.path.exists(os.path.join(self.directory, "open"))

    def open(self) -> None:
        """Let everyone pass, now and later. A directory can be made without any descriptor."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(self.directory, "open"))


# What the operating system knows


def open_fds(pid: int | None = None) -> dict[int, str]:
    """Open descriptors of a process (default: this one) and what they refer to."""
    directory = f"/proc/{pid or 'self'}/fd"
    found: dict[int, str] = {}
    for name in os.listdir(directory):
        # The descriptor that lists the directory is gone by now: readlink fails for it.
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"{directory}/{name}")
    return found


def process_state(pid: int) -> str | None:
    """The state letter of a process ('R', 'S', 'T', 'Z', ...), None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return None


def has_ended(pid: int) -> bool:
    """Whether a process has run its last instruction (a zombie has) and has nothing open."""
    if process_state(pid) not in (None, "Z", "X"):
        return False
    try:
        # The first thread is a zombie as soon as it has ended, be the others about to end.
        return len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):  # the latter if it was reaped just now
        return True


def await_end(pid: int) -> None:
    """Wait until a process has ended, without reaping it and without asking its Future."""
    wait_until(lambda: has_ended(pid), f"process {pid} to end")


def await_answer(future: Any) -> None:
    """Wait until a job has answered or its worker has died, without asking its Future."""
    import select

    flight = future._reactor.running.get(future)
    if flight is not None:
        poller = select.poll()
        poller.register(flight.channel, select.POLLIN)
        assert poller.poll(PATIENCE * 1000), f"gave up after {PATIENCE} s waiting for an answer"


def descendants(root: int | None = None) -> dict[int, str]:
    """All living or zombie descendants of a process (default: this one) with their state."""
    children = (
        _children_told
        if os.path.exists(f"/proc/self/task/{os.getpid()}/children")
        else _children_sought()
    )
    family: dict[int, str] = {}
    generation = {root or os.getpid()}
    while generation:
        found = {child for pid in generation for child in children(pid)} - family.keys()
        states = {child: process_state(child) for child in found}
        generation = {child for child, state in states.items() if state is not None}
        family.update((child, state) for child, state in states.items() if state is not None)
    return family


def _children_told(pid: int) -> set[int]:
    """The children of a process, as the kernel lists them; twice, as one that is reaped just then
    can hide its neighbour."""
    told: list[set[int]] = []
    while len(told) < 2 or told[-1] != told[-2]:
        found: set[int] = set()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children", "rb") as stream:
                    found.update(map(int, stream.read().split()))
        told.append(found)
    return told[-1]


def _children_sought() -> Callable[[int], set[int]]:
    """The same where the kernel has no such lists: from the parents of all processes there are."""
    families: dict[int, set[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stream:
            parent = int(stream.read().rpartition(b")")[2].split()[1])
            families.setdefault(parent, set()).add(int(name))
    return lambda pid: families.get(pid, set())


def session_members(sid: int) -> list[int]:
    """Living processes of a session, zombies left out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(name)) == sid and not has_ended(int(name)):
                    found.append(int(name))
    return found


def command_line(pid: int) -> str:
    """What a process was started as."""
    with open(f"/proc/{pid}/cmdline") as stream:
        return stream.read().replace("\0", " ")


def janitors_of(fifo: str) -> list[int]:
    """The janitors of programs that have joined the pool at a path."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if "_janitor.py" in command_line(int(name)) and fifo in open_fds(int(name)).values():
                found.append(int(name))
    return found


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process (default: this one)."""
    with open(f"/proc/{pid or 'self'}/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Programs of their own


def program_environment() -> dict[str, str]:
    """The environment for a program: this package and these helpers importable, no make."""
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS")}
    import jobserver

    source = os.path.dirname(os.path.dirname(jobserver.__file__))
    environment["PYTHONPATH"] = os.pathsep.join([source, os.path.dirname(__file__)])
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def run_program(
    arguments: Sequence[str],
    *,
    stdin: str | None = None,
    timeout: float = 60,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with arguments in a session of its own; kill all of it when late."""
    import subprocess

    with started_program(arguments, stdin=stdin is not None, cwd=cwd, env=env) as process:
        out, err = process.communicate(stdin, timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def started_program(
    arguments: Sequence[str],
    *,
    stdin: bool = False,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """Start this interpreter in a session of its own; at the end nothing of it is left."""
    import subprocess

    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**program_environment(), **(env or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                # A program that is gone does not read what is still buffered for it.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        process.wait()


# Judging


def chain_text(error: BaseException) -> str:
    """An exception with all its causes, as a traceback would show it."""
    import traceback

    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


def worker_pid(future: Any) -> int:
    """A running job's process id, from the Future's repr: the public place where it is shown."""
    return int(repr(future).rpartition("pid=")[2].rstrip(")"))


def settle(js: Any) -> None:
    """Wait until nothing of a Jobserver is in flight, whoever held the Futures."""

    def settled() -> bool:
        js.reclaim_resources()
        return "tracked=0" in repr(js)

    wait_until(settled, "all jobs to end")


def steady_fds(js: Any) -> int:
    """How many descriptors are open once nothing is in flight and all processes are reaped."""
    settle(js)
    counts: list[int] = []

    def steady() -> bool:
        js.reclaim_resources()
        counts.append(len(open_fds()))
        return len(counts) > 10 and len(set(counts[-10:])) == 1

    wait_until(steady, "the descriptors to be closed")
    return counts[-1]


def rested_fds(js: Any) -> int:
    """The same without any worker at rest."""
    settle(js)
    js._shared.reactor.dissolve()
    return steady_fds(js)


def free_slots(js: Any, gate: Gate, most: int = 64) -> int:
    """How many slots are free: by taking all of them, then letting the gate open."""
    from jobserver import Blocked

    futures: list[Any] = []
    try:
        while len(futures) < most:
            futures.append(js.submit(gate.enter, timeout=0))
    except Blocked:
        pass
    gate.open()
    for future in futures:
        future.result(timeout=PATIENCE)
    return len(futures)


def await_failing_callbacks(js: Any, gate: Gate) -> int:
    """Have jobs answered whose callbacks will fail; nobody has observed that yet. How many."""
    futures = [js.submit(gate.enter) for _ in range(2)]
    for future in futures:
        future.when_done(int, "no number")
    gate.open()
    for future in futures:
        await_answer(future)
    return len(futures)


#: The calls that observe the end of a job, by name: see observe().
OBSERVERS = ["done", "wait", "result", "submit", "reclaim_resources"]


def observe(js: Any, future: Any, how: str) -> None:
    """Let the named call observe the end of a job."""
    calls: dict[str, Callable[[], object]] = {
        "done": lambda: future.done(PATIENCE),
        "wait": lambda: future.wait(PATIENCE),
        "result": lambda: future.result(PATIENCE),
        "submit": lambda: js.submit(nothing, timeout=PATIENCE).wait(PATIENCE),
        "reclaim_resources": js.reclaim_resources,
    }
    calls[how]()


# Job functions


def nothing() -> None:
    """Do nothing."""


def identity(value: Any) -> Any:
    """Give back the argument."""
    return value


def add(a: int, b: int = 0) -> int:
    """A sum, for positional and keyword arguments."""
    return a + b


def everything(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give back all arguments."""
    return args, kwargs


def pid() -> int:
    """The worker's process id."""
    return os.getpid()


def touch(path: str) -> None:
    """Leave a file behind, as proof of having run."""
    with open(path, "a"):
        pass


def append(path: str, line: str) -> None:
    """Add a line to a file: one write, so that lines of several processes do not mix."""
    with open(path, "a") as stream:
        stream.write(line + "\n")


def lines(path: Path) -> list[str]:
    """The lines that append() has written."""
    return path.read_text().splitlines() if path.exists() else []


def getenv(*names: str) -> list[str | None]:
    """What the worker's environment says."""
    return [os.environ.get(name) for name in names]


def fail(kind: type, *args: Any) -> None:
    """Raise an exception of the given kind."""
    raise kind(*args)


def sleep(seconds: float) -> float:
    """Take a known time."""
    time.sleep(seconds)
    return seconds


def die(signum: int) -> None:
    """Die of a signal, whatever handler this process inherited, without a core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if signum not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signum])
    os.kill(os.getpid(), signum)


def hard_exit(status: int) -> None:
    """End the process without any cleaning up."""
    os._exit(status)


def soft_exit(status: Any) -> None:
    """End the process as a program would."""
    sys.exit(status)
