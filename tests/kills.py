# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""SIGKILL at a chosen instant, and what it leaves behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Callable

if TYPE_CHECKING:
    from collections.abc import Iterator

PR_SET_CHILD_SUBREAPER = 36


def die_at(step: int, what: str, action: Callable[[], Any]) -> None:
    """
    Run an action; SIGKILL this process before a given step of the slots' code.

    Args:
        step: Which, from 1 on.
        what: What counts as a step: each "line", each "opcode", or each "place": a line, once.
        action: What to do.
    """
    count = 0
    event_of_a_step = "opcode" if what == "opcode" else "line"
    seen: set[tuple[str, int]] = set()
    victim = os.getpid()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if "_slots" not in frame.f_code.co_filename:
            return trace if frame.f_back is not None else None
        frame.f_trace_opcodes = what == "opcode"
        if event == event_of_a_step:
            place = (frame.f_code.co_filename, frame.f_lineno)
            if what == "place" and place in seen:
                return trace
            seen.add(place)
            count += 1
            # Not who is forked meanwhile, as tracing goes on there.
            if count == step and os.getpid() == victim:
                os.kill(victim, signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """
    Be the parent of all orphans below this process, until the end of the block.

    So whom to kill is chosen among this process's own descendants only, never by a number that may
    have become somebody else's.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
