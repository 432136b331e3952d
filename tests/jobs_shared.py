# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs that use multiprocessing objects which came as arguments."""

from __future__ import annotations

import os
import time
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from helpers import PATIENCE

if TYPE_CHECKING:
    from jobserver import Jobserver


def put(queue: Any, value: Any) -> None:
    """Put into a queue."""
    queue.put(value)


def send(connection: Any, value: Any) -> None:
    """Send through a connection and close it."""
    connection.send(value)
    connection.close()


def echo(connection: Any) -> Any:
    """Receive, send back, and answer."""
    value = connection.recv()
    connection.send(value)
    return value


def count_up(lock: Any, value: Any, times: int) -> None:
    """Add to a shared number that is not atomic, under a lock."""
    for _ in range(times):
        with lock:
            seen = value.value
            time.sleep(0)
            value.value = seen + 1


def pass_event(event: Any, answer: Any) -> bool:
    """Wait for one event, then set another."""
    came = event.wait(PATIENCE)
    answer.set()
    return bool(came)


def meet(barrier: Any) -> int:
    """Wait until all parties have come."""
    return int(barrier.wait(PATIENCE))


def notify(condition: Any, flag: Any) -> None:
    """Set a flag under a condition."""
    with condition:
        flag.value = 1
        condition.notify_all()


def write_shared(name: str, data: bytes) -> int:
    """Write into a shared memory block by name."""
    from multiprocessing import shared_memory

    block: Any = shared_memory.SharedMemory(name=name)
    block.buf[: len(data)] = data
    block.close()
    return len(data)


def write_block(block: Any, data: bytes) -> None:
    """Write into a shared memory block that came as an argument."""
    block.buf[: len(data)] = data
    block.close()


def fill(proxy: Any, value: Any) -> None:
    """Append to a manager's list."""
    proxy.append(value)


def write_fd(connection: Any) -> None:
    """Send from a process that got a connection inside a structure."""
    connection["deep"][0].send("deep")


def hand_on(js: Jobserver, connection: Any) -> None:
    """Give a connection to a nested job."""
    js.submit(send, args=(connection, "from below")).result()


def tracker_pipe() -> tuple[int, int]:
    """Which pipe leads to the resource tracker of this process."""
    tracker: Any = resource_tracker
    status = os.fstat(tracker.getfd())
    return status.st_dev, status.st_ino
