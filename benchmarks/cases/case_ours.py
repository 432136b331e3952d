# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""This package, as it is in the checkout."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

from workload import System, Unavailable, nothing_with

#: How a Jobserver is told to reuse its workers.
WARM = {"max_tasks_per_child": None}


class Ours(System):
    """A Jobserver: fresh processes, or warm ones."""

    travels = True

    def __init__(
        self, slots: int, *, method: str, warm: bool = False, chunksize: Any = None
    ) -> None:
        from jobserver import Jobserver

        make: Any = Jobserver
        try:
            self.jobserver = make(method, slots, **(WARM if warm else {}))
        except TypeError as error:
            if warm and "max_tasks_per_child" in str(error):
                raise Unavailable("this version has no warm workers") from error
            raise
        self.chunksize = chunksize
        self.by_map = chunksize is not None
        if isinstance(chunksize, str):
            self.probe_chunksize()

    def probe_chunksize(self) -> None:
        try:
            list(self.map(nothing_with, range(1)))
        except (TypeError, ValueError) as error:
            if "chunksize" not in str(error):
                raise
            raise Unavailable(f"this version has no chunksize={self.chunksize!r}") from error

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.jobserver(fn, *args)

    def map(self, fn: Any, items: Any) -> Any:
        return self.jobserver.map(fn, zip(items), chunksize=self.chunksize)

    def close(self) -> None:
        self.jobserver.__exit__(None, None, None)


class Executor(System):
    """A JobserverExecutor, as ProcessPoolExecutor's users would write it."""

    def __init__(self, slots: int, *, method: str, chunksize: Optional[int] = None) -> None:
        import multiprocessing

        from jobserver import JobserverExecutor

        self.executor = JobserverExecutor(slots, multiprocessing.get_context(method))
        self.chunksize = chunksize or 1
        self.by_map = chunksize is not None

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def map(self, fn: Any, items: Any) -> Any:
        return self.executor.map(fn, items, chunksize=self.chunksize)

    def close(self) -> None:
        self.executor.shutdown()


VARIANTS = {
    "fork": partial(Ours, method="fork"),
    "forkserver": partial(Ours, method="forkserver"),
    "spawn": partial(Ours, method="spawn"),
    "warm-fork": partial(Ours, method="fork", warm=True),
    "warm-forkserver": partial(Ours, method="forkserver", warm=True),
    "executor-fork": partial(Executor, method="fork"),
    "executor-forkserver": partial(Executor, method="forkserver"),
    "map-1": partial(Ours, method="fork", warm=True, chunksize=1),
    "map-100": partial(Ours, method="fork", warm=True, chunksize=100),
    "map-auto": partial(Ours, method="fork", warm=True, chunksize="auto"),
    "fork-map-1": partial(Ours, method="fork", chunksize=1),
    "fork-map-100": partial(Ours, method="fork", chunksize=100),
    "fork-map-auto": partial(Ours, method="fork", chunksize="auto"),
    "executor-map-1": partial(Executor, method="fork", chunksize=1),
    "executor-map-100": partial(Executor, method="fork", chunksize=100),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
