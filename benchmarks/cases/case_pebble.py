# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Pebble."""

from __future__ import annotations

from functools import partial
from typing import Any

from workload import System


class Pebble(System):
    """A ProcessPool."""

    by_map = True

    def __init__(self, slots: int, *, chunksize: int) -> None:
        import multiprocessing

        from pebble import ProcessPool

        context = multiprocessing.get_context("fork")
        self.pool: Any = ProcessPool(max_workers=slots, context=context)
        self.chunksize = chunksize

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.pool.schedule(fn, args)

    def map(self, fn: Any, items: Any) -> Any:
        return self.pool.map(fn, items, chunksize=self.chunksize).result()

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


VARIANTS = {
    "map-1": partial(Pebble, chunksize=1),
    "map-100": partial(Pebble, chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
