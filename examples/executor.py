# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I use a Jobserver where a concurrent.futures.Executor is wanted?"""

from __future__ import annotations

import concurrent.futures
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event

from jobserver import Jobserver, JobserverExecutor


def square(number: int) -> int:
    """Return number squared."""
    return number * number


def await_event(event: Event) -> bool:
    """Keep a slot until someone sets the event."""
    return event.wait()


def main(context: str | None = None) -> None:
    """Map, collect as completed, cancel what is pending, and survive a crash."""
    with Jobserver(context, slots=1) as js, JobserverExecutor(js) as executor:
        print("map:", list(executor.map(square, range(5))))

        futures = [executor.submit(square, number) for number in range(5, 8)]
        done = concurrent.futures.as_completed(futures)
        print("as completed:", sorted(future.result() for future in done))

        # The executor takes its slots from the Jobserver. While another job has the only one,
        # what is submitted here stays pending, and what is pending can be cancelled.
        release = js.context.Event()
        busy = js(await_event, release)
        wanted, unwanted = executor.submit(square, 8), executor.submit(square, 9)
        print("cancelled:", unwanted.cancel())
        release.set()
        print("wanted:", wanted.result(), "- busy:", busy.result())

        # A worker that dies takes its own future with it, and no other.
        crash, healthy = executor.submit(os._exit, 3), executor.submit(square, 10)
        try:
            crash.result()
        except BrokenProcessPool as death:
            print("crashed:", death)
        print("healthy:", healthy.result())


if __name__ == "__main__":
    main(*sys.argv[1:])
