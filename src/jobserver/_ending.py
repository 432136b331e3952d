# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The end of a process that has jobs in flight: it waits for them, as for its threads.

Registered for the end of the main program, and called by workers before they answer: a slot must
be returned by whoever has taken it, and callbacks are never silently dropped.
"""

from __future__ import annotations

import atexit
import warnings

from ._admission import Admission
from ._errors import CallbackRaised, shown
from ._forking import stale
from ._reactor import active_reactors

# Workers at rest end as soon as they are told, unless they have been stopped.
_LINGER = 1.0


@atexit.register
def finish_jobs() -> None:
    """Wait for all jobs that this process has submitted, and issue their callbacks."""
    if stale():
        return  # this worker has submitted nothing: what is in flight is its parent's
    for reactor in active_reactors():
        admission = Admission(reactor)
        while True:
            try:
                admission.wait_for_all()
                break
            except CallbackRaised as raised:
                warn_suppressed(raised)
        if reactor.crew:
            reactor.dissolve()
            reactor.reap_lingering(_LINGER)


def warn_suppressed(raised: CallbackRaised) -> None:
    """Tell of a callback's error that can be raised nowhere any more."""
    cause = shown(raised.__cause__)
    warnings.warn(f"suppressed {raised!r} from {cause}", RuntimeWarning, stacklevel=4)
