# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""May many threads share one Jobserver, and even one Future?"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized

from jobserver import Future, Jobserver


def work(running: Synchronized[int], peak: Synchronized[int], number: int) -> int:
    """Return number squared and note how many jobs were running at the same time."""
    with running.get_lock():
        running.value += 1
        peak.value = max(peak.value, running.value)
    time.sleep(0.01)
    with running.get_lock():
        running.value -= 1
    return number * number


def main(context: str | None = None) -> None:
    """Submit from four threads to two slots, then wait for one job in four threads."""
    with Jobserver(context, slots=2) as js:
        running, peak = js.context.Value("i", 0), js.context.Value("i", 0)
        squares: dict[int, int] = {}

        def submit(number: int) -> None:
            for n in (number, number + 4):
                squares[n] = js(work, running, peak, n).result()

        run_in_threads(submit)
        assert squares == {n: n * n for n in range(8)}
        assert 1 <= peak.value <= 2
        print(f"4 threads, {len(squares)} jobs, never more than 2 at the same time")

        shared: Future[int] = js(work, running, peak, 7)
        seen: list[int] = []
        run_in_threads(lambda _: seen.append(shared.result()))
        print("one result, seen by 4 threads:", seen)


def run_in_threads(target: Callable[[int], None]) -> None:
    """Call target(0) to target(3), each in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=target, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
