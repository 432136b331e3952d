# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""loky."""

from __future__ import annotations

from functools import partial
from typing import Any

from workload import System


class Loky(System):
    """The executor that loky keeps for the whole program."""

    def __init__(self, slots: int, *, chunksize: int) -> None:
        from loky import get_reusable_executor

        self.executor: Any = get_reusable_executor(max_workers=slots)
        self.chunksize = chunksize
        self.by_map = True

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def map(self, fn: Any, items: Any) -> Any:
        return self.executor.map(fn, items, chunksize=self.chunksize)

    def close(self) -> None:
        self.executor.shutdown()


VARIANTS = {
    "map-1": partial(Loky, chunksize=1),
    "map-100": partial(Loky, chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
