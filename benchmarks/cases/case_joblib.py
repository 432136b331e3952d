# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""joblib, whose default backend is its own copy of loky."""

from __future__ import annotations

from typing import Any

from workload import System


class Joblib(System):
    """A Parallel that keeps its workers, with batches as large as it finds good."""

    by_map = True

    def __init__(self, slots: int) -> None:
        from joblib import Parallel, delayed

        self.delayed: Any = delayed
        # With one it would start no process, and send nothing anywhere.
        self.parallel: Any = Parallel(n_jobs=max(slots, 2))
        self.parallel.__enter__()

    def submit(self, fn: Any, *args: Any) -> Any:
        # There is no call that submits: the one result is there when this returns.
        return self.parallel([self.delayed(fn)(*args)])

    def result(self, handle: Any) -> Any:
        return handle[0]

    def map(self, fn: Any, items: Any) -> Any:
        return self.parallel(self.delayed(fn)(item) for item in items)

    def close(self) -> None:
        self.parallel.__exit__(None, None, None)


VARIANTS = {"auto": Joblib}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
