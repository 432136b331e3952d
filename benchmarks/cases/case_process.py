# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""multiprocessing.Process, by hand: as few as anybody can write, and without any result."""

from __future__ import annotations

from functools import partial
from typing import Any

from workload import System


class Processes(System):
    """One Process for each job, and not more at once than there are slots."""

    def __init__(self, slots: int, *, method: str) -> None:
        import multiprocessing
        from multiprocessing.connection import wait

        self.context: Any = multiprocessing.get_context(method)
        self.slots = slots
        self.wait = wait
        self.running: list[Any] = []

    def submit(self, fn: Any, *args: Any) -> Any:
        while len(self.running) >= self.slots:
            self.wait([process.sentinel for process in self.running])
            self.running = [process for process in self.running if process.is_alive()]
        process = self.context.Process(target=fn, args=args)
        process.start()
        self.running.append(process)
        return process

    def result(self, handle: Any) -> None:
        handle.join()

    def close(self) -> None:
        for process in self.running:
            process.join()


VARIANTS = {
    "fork": partial(Processes, method="fork"),
    "forkserver": partial(Processes, method="forkserver"),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
