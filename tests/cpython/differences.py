# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The cases of CPython's tests that JobserverExecutor does not pass, by design, and why.

A case that is here and passes is an error, as is one that fails and is not here.
"""

from __future__ import annotations

from typing import NamedTuple

FORK = ("fork",)
REMOTE = ("spawn", "forkserver")
EVERY = (*FORK, *REMOTE)


class Difference(NamedTuple):
    """With which start methods a case differs, and the reason."""

    methods: tuple[str, ...]
    reason: str


_DEATH = "A worker that dies fails only its own future: the next submit is not refused."
_NOT_PICKLED = (
    "Under fork a call is not pickled, as its worker is forked with it: nothing can go wrong"
    " with pickling or unpickling, and the call is simply made."
)
_NO_COPY = (
    "Under fork the worker has no unpickled copy of the arguments that could be collected"
    " when the call is done; they are the parent's."
)
_ON_DEMAND = (
    "A worker is started for a call, when it has a slot. The test counts workers of calls that"
    " cannot be pickled (spawn, forkserver), or that have not been made (fork)."
)
_ONE_THREAD = (
    "The test refuses the pool its second thread, and wants it broken. There is no second one:"
    " the call is made (and raises TypeError, as the test gives it too few arguments)."
)

DIFFERENCES = {
    "ExecutorDeadlockTest.test_crash_at_task_unpickle": Difference(FORK, _NOT_PICKLED),
    "ExecutorDeadlockTest.test_error_at_task_pickle": Difference(FORK, _NOT_PICKLED),
    "ExecutorDeadlockTest.test_error_at_task_unpickle": Difference(FORK, _NOT_PICKLED),
    "ExecutorDeadlockTest.test_exit_at_task_unpickle": Difference(FORK, _NOT_PICKLED),
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": Difference(FORK, _NOT_PICKLED),
    "ProcessPoolExecutorTest.test_killed_child": Difference(EVERY, _DEATH),
    "ProcessPoolExecutorTest.test_python_finalization_error": Difference(EVERY, _ONE_THREAD),
    "ProcessPoolExecutorTest.test_ressources_gced_in_workers": Difference(FORK, _NO_COPY),
    "ProcessPoolExecutorTest.test_saturation": Difference(REMOTE, _ON_DEMAND),
    "ProcessPoolShutdownTest.test_processes_terminate": Difference(EVERY, _ON_DEMAND),
}

#: Reasons for which a test may skip itself.
SKIPS = ("Windows-only process limit", "Incompatible with the fork start method.")


def differing(method: str) -> dict[str, str]:
    """Names of the cases that differ with a start method, and why."""
    return {name: d.reason for name, d in DIFFERENCES.items() if method in d.methods}
