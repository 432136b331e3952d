# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
One pool of slots for a program and everything it starts.

``Jobserver`` runs calls in worker processes, each on a slot; handed to those calls, it lets them
submit more on the same slots, at any depth. ``JobserverExecutor`` is the same as a
``concurrent.futures.Executor``.
"""

from ._errors import Blocked, CallbackRaised, SubmissionDied
from ._executor import JobserverExecutor
from ._future import Future
from ._jobserver import Jobserver
from ._version import __version__

__all__ = (
    "Blocked",
    "CallbackRaised",
    "Future",
    "Jobserver",
    "JobserverExecutor",
    "SubmissionDied",
    "__version__",
)
