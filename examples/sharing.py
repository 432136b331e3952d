# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I share queues, locks, connections and memory between jobs?"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from multiprocessing.shared_memory import ShareableList
from multiprocessing.synchronize import Lock

from jobserver import Jobserver


def add(numbers: ShareableList[int], lock: Lock, times: int) -> None:
    """Count up in memory that other jobs count up in at the same time."""
    for _ in range(times):
        # Reading and writing are two steps: without the lock, counts would be lost.
        with lock:
            numbers[0] += 1
    numbers.shm.close()


def produce(queue: Queue[int], numbers: range) -> None:
    """Send results while the job is still running."""
    for number in numbers:
        queue.put(number * number)


def reply(connection: Connection) -> None:
    """Answer one question."""
    with connection:
        connection.send(connection.recv().upper())


def main(context: str | None = None) -> None:
    """Pass each kind of object as a plain argument."""
    with Jobserver(context, slots=2) as js:
        # All of them must come from the Jobserver's own context, so that they suit its workers.
        lock = js.context.Lock()
        numbers = ShareableList([0])
        try:
            list(js.map(add, [(numbers, lock, 100), (numbers, lock, 100)]))
            print("shared memory and lock:", numbers[0])
        finally:
            numbers.shm.close()
            numbers.shm.unlink()

        queue: Queue[int] = js.context.Queue()
        producer = js(produce, queue, range(5))
        print("queue:", [queue.get(timeout=30) for _ in range(5)])
        producer.result()

        here, there = js.context.Pipe()
        with here, there:
            answered = js(reply, there)
            here.send("hello")
            print("connection:", here.recv())
            answered.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
