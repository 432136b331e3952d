# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The package that has the name jobserver on PyPI; its environment has no other of that name."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from workload import System

# By its name at run time: a type checker would take it for this project's package.
PACKAGE = "jobserver"


class Peer(System):
    """Its Jobserver: a fresh process for each job."""

    travels = True

    def __init__(self, slots: int, *, method: str) -> None:
        self.jobserver = import_module(PACKAGE).Jobserver(method, slots)

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.jobserver.submit(fn=fn, args=args)

    def close(self) -> None:
        self.jobserver.__exit__(None, None, None)


class Executor(System):
    """Its executor, which has a process and two threads between the caller and the jobs."""

    def __init__(self, slots: int, *, method: str) -> None:
        package = import_module(PACKAGE)
        self.executor = package.JobserverExecutor(package.Jobserver(method, slots))

    def submit(self, fn: Any, *args: Any) -> Any:
        return self.executor.submit(fn, *args)

    def close(self) -> None:
        self.executor.shutdown()


VARIANTS = {
    "fork": partial(Peer, method="fork"),
    "forkserver": partial(Peer, method="forkserver"),
    "executor-fork": partial(Executor, method="fork"),
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
