# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs of the tests of map with calls that workers share."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, ClassVar

from helpers import append, touch, wait_until
from jobs_results import SoftExitWhenUnpickled

if TYPE_CHECKING:
    from helpers import Gate

    from jobserver import Jobserver


def note(path: str, number: int) -> int:
    """Say that this call has begun."""
    append(path, str(number))
    return number


def note_and_enter_if(path: str, number: int, gate: Gate, held: int) -> int:
    """Note the call, and enter the gate for one of the inputs."""
    note(path, number)
    if number == held:
        gate.enter()
    return number


_counted = itertools.count(1)


def open_last(gate: Gate, hold: bool, others: int) -> bool:
    """Enter the gate; or open it once this worker has made so many calls that do not."""
    if hold:
        gate.enter()
    elif next(_counted) == others:
        gate.open()
    return hold


def meet_neighbour(directory: str, number: int) -> int:
    """Wait for the other call of a pair: 0 and 1, 2 and 3, ..."""
    touch(os.path.join(directory, str(number)))
    wait_until(lambda: os.path.exists(os.path.join(directory, str(number ^ 1))), "the other call")
    return number


def end_for(path: str, number: int, bad: int, how: str) -> int:
    """Note the call, and end in the way named when it is the bad one."""
    append(path, str(number))
    if number == bad:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "_exit":
            os._exit(3)
        elif how == "exit":
            sys.exit(3)
        elif how == "interrupt":
            raise KeyboardInterrupt
        raise LookupError(number)
    return number


def hold_or_die(gate: Gate, path: str, number: int) -> int:
    """In the first batch wait for the gate; the second dies in the middle."""
    if number == 9:
        wait_until(gate.is_open, "the gate")
    return end_for(path, number, 15, "_exit")


def big(number: int) -> bytes:
    """More with every call, up to 300,000 bytes."""
    return bytes([number % 251]) * (number * 6000)


def odd_result(number: int, bad: int) -> Any:
    """A result that cannot be pickled when it is the bad one."""
    return threading.Lock() if number == bad else number


class Explosive:
    """Unpickles everywhere but in another process than it was made in, if it is armed."""

    def __init__(self, number: int, armed: bool) -> None:
        self.number = number
        self.armed = armed

    def __reduce__(self) -> Any:
        return _explode, (self.number, self.armed, os.getpid())


def _explode(number: int, armed: bool, made_in: int) -> Explosive:
    if armed and os.getpid() != made_in:
        raise LookupError("armed")
    return Explosive(number, armed)


def number_of(explosive: Explosive) -> int:
    """Take an argument that may not arrive."""
    return explosive.number


def explosive(number: int, bad: int) -> Explosive:
    """Give a result that may not arrive."""
    return Explosive(number, number == bad)


def through(gate: Gate, number: int, held: int) -> int:
    """Stay at the gate when this is the call to be held."""
    if number == held:
        gate.enter()
    return number


def meet(directory: str, number: int, first: int, second: int) -> int:
    """Two of the calls end only if the other one has begun."""
    if number in (first, second):
        append(os.path.join(directory, str(number)), "here")
        other = os.path.join(directory, str(first + second - number))
        wait_until(lambda: os.path.exists(other), "the other call")
    return number


def doubled(number: int, bad: int) -> int:
    """Fork when this is the bad call, and return in the child, too."""
    if number == bad and os.fork() == 0:
        return -1
    return number


def pid_for(number: int) -> int:
    """The worker's process id."""
    return os.getpid()


def mapped_inside(js: Jobserver, count: int) -> list[int]:
    """A map inside a job."""
    return list(js.map(abs, [(-n,) for n in range(count)], chunksize="auto"))


def soft_exit_result(number: int, bad: int) -> Any:
    """A result that asks the process that unpickles it to end when it is the bad one."""
    return SoftExitWhenUnpickled() if number == bad else number


class Telltale:
    """Notes in each process which of them have been unpickled there."""

    seen: ClassVar[list[int]] = []

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _arrive, (self.number,)


def _arrive(number: int) -> Telltale:
    Telltale.seen.append(number)
    return Telltale(number)
