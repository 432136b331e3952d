# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A job as the worker gets it."""

from __future__ import annotations

import os
from typing import Any, Callable, NamedTuple, Optional

from . import _stay


def manager_of(preexec_fn: Callable[[], Any]) -> Any:
    """Call ``preexec_fn``; return the context manager that it returns, else None."""
    found = preexec_fn()
    kind = type(found)
    if hasattr(kind, "__enter__") and hasattr(kind, "__exit__"):
        return found
    # Any other value, as `os.nice` or `os.umask` return one, is ignored, as subprocess does.
    _stay.spoil()  # what it has done can be undone by nobody
    return None


class Task(NamedTuple):
    """One call, and what is to be done before it."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    env: dict[str, Optional[str]]
    preexec_fn: Optional[Callable[[], Any]]
    first: Optional[Callable[[], Any]] = None  # called once in each worker


def perform(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    env: dict[str, Optional[str]],
    preexec_fn: Optional[Callable[[], Any]],
    first: Optional[Callable[[], Any]] = None,
) -> Any:
    """Run a task, given its parts: apply env and preexec_fn, then call fn."""
    if env:
        _apply(env)
    if preexec_fn is not None:
        manager = manager_of(preexec_fn)
        if manager is not None:
            with manager:
                if first is not None:
                    first()
                return fn(*args, **kwargs)
            return None  # the manager has suppressed fn's exception
    if first is not None:
        first()
    return fn(*args, **kwargs)


def _apply(env: dict[str, Optional[str]]) -> None:
    for name, value in env.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
