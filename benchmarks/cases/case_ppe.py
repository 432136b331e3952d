# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""concurrent.futures.ProcessPoolExecutor."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

from workload import System


class Executor(System):
    """The standard library's executor."""

    def __init__(self, slots: int, *, method: str, chunksize: Optional[int] = None) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(slots, multiprocessing.get_context(method))
        self.chunksize = chunksize or 1
        self.by_map = chunksize is not None

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def map(self, fn: Any, items: Any) -> Any:
        return self.executor.map(fn, items, chunksize=self.chunksize)

    def close(self) -> None:
        self.executor.shutdown()


VARIANTS = {
    "fork": partial(Executor, method="fork"),
    "forkserver": partial(Executor, method="forkserver"),
    "map-1": partial(Executor, method="fork", chunksize=1),
    "map-100": partial(Executor, method="fork", chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
