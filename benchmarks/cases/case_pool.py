# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""multiprocessing.Pool."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

from workload import System, nothing


class Pool(System):
    """The standard library's pool, with warm workers or one job to a worker."""

    def __init__(self, slots: int, *, chunksize: Optional[int] = None, fresh: bool = False) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        self.pool = context.Pool(slots, maxtasksperchild=1 if fresh else None)
        self.chunksize = chunksize or 1
        self.by_map = chunksize is not None

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.pool.apply_async(fn, args)

    def result(self, handle: Any) -> Any:
        return handle.get()

    def once(self) -> None:
        self.pool.apply(nothing)

    def map(self, fn: Any, items: Any) -> Any:
        if self.chunksize == 1:
            return self.pool.imap(fn, items)
        return self.pool.map(fn, items, self.chunksize)

    def close(self) -> None:
        self.pool.close()
        self.pool.join()


VARIANTS = {
    "fork": Pool,
    "fresh-fork": partial(Pool, fresh=True),
    "imap-1": partial(Pool, chunksize=1),
    "map-100": partial(Pool, chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
