# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs with a special behaviour: what surrounds them, how they answer, how they nest.

Plain ones (add, identity, sleep, ...) are in helpers.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from helpers import METHODS, PATIENCE, add, append, getenv, identity, touch, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers import Gate

    from jobserver import Jobserver

# preexec_fn


class Appender:
    """A preexec_fn that leaves a mark each time."""

    def __init__(self, path: Path, mark: str = "x", answer: Any = None) -> None:
        self.path = str(path)
        self.mark = mark
        self.answer = answer

    def __call__(self) -> Any:
        append(self.path, f"{self.mark} {os.getpid()}")
        return self.answer


class Wrapper:
    """A preexec_fn that returns a context manager, which notes what it sees."""

    def __init__(self, path: Path, suppress: bool = False, fail_at_exit: bool = False) -> None:
        self.path = str(path)
        self.suppress = suppress
        self.fail_at_exit = fail_at_exit

    def __call__(self) -> contextlib.AbstractContextManager[None]:
        append(self.path, "called")
        return self.manage()

    @contextlib.contextmanager
    def manage(self) -> Iterator[None]:
        append(self.path, "entered")
        try:
            yield
        except Exception as error:
            append(self.path, type(error).__name__)
            if not self.suppress:
                raise
        finally:
            append(self.path, "left")
            if self.fail_at_exit:
                raise OSError("left badly")


class RaisingEntry:
    """A context manager that cannot be entered."""

    def __enter__(self) -> None:
        raise LookupError("no entry")

    def __exit__(self, *exc: object) -> None:
        raise AssertionError("left without having been entered")


def raising_entry() -> RaisingEntry:
    """A preexec_fn whose context manager cannot be entered."""
    return RaisingEntry()


def refuse() -> None:
    """A preexec_fn that raises."""
    raise LookupError("not today")


def environment_note(path: str) -> None:
    """Note the variable that the tests set."""
    append(path, f"{getenv('JOBSERVER_T')[0]}")


class NoteEnvironment:
    """A preexec_fn that notes the variable that the tests set."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __call__(self) -> None:
        environment_note(self.path)


# Failing and handling signals


def divide_deeply(depth: int) -> float:
    """Fail in a stack of depth + 1 frames."""
    return 1 / 0 if depth == 0 else divide_deeply(depth - 1)


def fail_from_cause() -> None:
    """Raise an exception that has a cause."""
    try:
        raise LookupError("the cause")
    except LookupError as error:
        raise RuntimeError("the effect") from error


class Catcher:
    """A job that handles one signal, and answers through the gate with what it has caught."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, signum: int) -> list[int]:
        caught: list[int] = []
        signal.signal(signum, lambda number, frame: caught.append(number))
        touch(f"{self.gate.directory}/in.{os.getpid()}")
        wait_until(lambda: caught, "the signal")
        wait_until(self.gate.is_open, "the gate to open")
        return caught


# For map


def slow_for(number: int) -> int:
    """Finish out of order: even numbers take longer."""
    time.sleep(0.0 if number % 2 else 0.02)
    return number


def fail_for(number: int, bad: int) -> int:
    """Fail for one of the inputs."""
    if number == bad:
        raise LookupError(number)
    return number


def exit_for(number: int, bad: int) -> int:
    """Die for one of the inputs."""
    if number == bad:
        os._exit(5)
    return number


def enter_if(gate: Gate, wait: bool) -> bool:
    """Stand at the gate, or not."""
    if wait:
        gate.enter()
    return wait


def nested_map(js: Jobserver, count: int) -> list[int]:
    """Map inside a job."""
    return list(js.map(identity, [(n,) for n in range(count)]))


# Handles inside jobs


def nested_at_gate(js: Jobserver, gate: Gate) -> int:
    """Start a child that stands at the gate, and wait for it."""
    return js.submit(gate.enter).result()


def nest(js: Jobserver, depth: int) -> list[int]:
    """A chain of nested jobs; the process ids from here down."""
    below = js.submit(nest, args=(js, depth - 1), timeout=PATIENCE).result() if depth else []
    return [os.getpid(), *below]


def close_in_job(js: Jobserver) -> list[Any]:
    """Use the handle in a with-block of the job's own; then try again."""
    with js:
        answers: list[Any] = [js.submit(identity, args=(1,)).result()]
    try:
        js.submit(identity, args=(2,))
    except Exception as error:
        answers.append(type(error).__name__)
    return answers


def use_handles_in_job(handles: dict[str, Any]) -> list[Any]:
    """Submit through handles that came in a structure."""
    used = [handles["copy"][0], handles["sibling"]]
    return [js.submit(getenv, args=("JOBSERVER_T",)).result() for js in used]


def tracked_in_job(js: Jobserver) -> str:
    """What the handle shows inside the job."""
    js.reclaim_resources()
    return repr(js)


def name_of_worker() -> str:
    """This process's name."""
    return multiprocessing.current_process().name


# What a worker's process is like


def note_in(path: str) -> int:
    """Note that fn ran, and where."""
    append(path, f"fn {os.getpid()}")
    return os.getpid()


def environment_of_a_program() -> str:
    """What a program that the job starts sees."""
    import subprocess

    command = [sys.executable, "-c", "import os; print(os.environ.get('JOBSERVER_T'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def random_number() -> float:
    """A number from the module's shared generator."""
    import random

    return random.random()


def signal_state() -> tuple[list[int], bool]:
    """Blocked signals, and whether SIGINT raises KeyboardInterrupt."""
    blocked = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    return blocked, signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _say(connection: Any) -> None:
    connection.send("from the grandchild")
    connection.close()


def multiprocessing_child() -> Any:
    """Start a process with multiprocessing and hear from it."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_say, args=(theirs,))
    process.start()
    answer = ours.recv()
    process.join()
    return answer


def finalizer(path: str) -> None:
    """Register a finalizer that leaves a file behind."""
    multiprocessing.util.Finalize(None, touch, args=(path,), exitpriority=10)


def threads_left(path: str) -> str:
    """Leave a thread that ends later, and a daemon that never does."""

    def later() -> None:
        time.sleep(0.1)
        touch(path)

    threading.Thread(target=later).start()
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    return "left"


def print_both() -> None:
    """Print to both streams, without flushing."""
    sys.stdout.write("out ")
    sys.stderr.write("err")


def other_methods() -> list[int]:
    """Use a Jobserver of each start method inside a job."""
    from jobserver import Jobserver

    answers = []
    for name in METHODS:
        with Jobserver(name, 1) as js:
            answers.append(js.submit(add, args=(1, 2)).result())
    return answers


def use_from_threads(js: Jobserver, count: int) -> list[int]:
    """Submit from several threads of one job."""
    answers: list[int] = []

    def work(number: int) -> None:
        answers.append(js.submit(identity, args=(number,)).result())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(answers)
