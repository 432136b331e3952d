# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The executors whose threads run, and what the end of the interpreter is to them."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Optional

from . import _forking

if TYPE_CHECKING:
    from ._engine import Engine

engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_ended_in: Optional[int] = None  # the process whose interpreter has begun to end


def interpreter_ends() -> bool:
    """Say whether this process's interpreter has begun to end."""
    return _ended_in == os.getpid()


def _at_exit() -> None:
    """Let all executors finish before threads are joined, as the standard library does."""
    global _ended_in  # noqa: PLW0603
    _ended_in = os.getpid()
    if _forking.stale():
        return  # what there is is the parent's
    found = list(engines)
    for engine in found:
        engine.stop()
    for engine in found:
        engine.join()


_at_end: Any = threading
_at_end._register_atexit(_at_exit)
