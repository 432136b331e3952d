# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
One pool of slots for a program and everything it starts.

``Jobserver`` runs calls in worker processes, each on a slot; handed to those calls, it lets them
submit more on the same slots, at any depth. ``JobserverExecutor`` is the same as a
``concurrent.futures.Executor``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._errors import Blocked, CallbackRaised, SubmissionDied
from ._future import Future
from ._jobserver import Jobserver
from ._version import __version__

if TYPE_CHECKING:
    from ._executor import JobserverExecutor

__all__ = (
    "Blocked",
    "CallbackRaised",
    "Future",
    "Jobserver",
    "JobserverExecutor",
    "SubmissionDied",
    "__version__",
)


def __getattr__(name: str) -> Any:
    # What the executor imports (logging, queues) has hooks that each fork would pay for.
    if name == "JobserverExecutor":
        from ._executor import JobserverExecutor

        globals()[name] = JobserverExecutor
        return JobserverExecutor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
