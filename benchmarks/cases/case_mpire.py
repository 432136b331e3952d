# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""mpire."""

from __future__ import annotations

from functools import partial
from typing import Any

from workload import System


class Mpire(System):
    """A WorkerPool that keeps its workers."""

    by_map = True

    def __init__(self, slots: int, *, chunksize: int) -> None:
        from mpire import WorkerPool

        self.pool: Any = WorkerPool(slots, start_method="fork", keep_alive=True)
        self.chunksize = chunksize

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, handle: Any) -> Any:
        return handle.get()

    def map(self, fn: Any, items: Any) -> Any:
        return self.pool.map(fn, items, chunk_size=self.chunksize)

    def close(self) -> None:
        self.pool.stop_and_join()
        self.pool.terminate()


VARIANTS = {
    "map-1": partial(Mpire, chunksize=1),
    "map-100": partial(Mpire, chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
