# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Several calls of an executor's map in one worker."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

T = TypeVar("T")


def run_batch(fn: Callable[..., T], batch: tuple[tuple[Any, ...], ...]) -> list[T]:
    """Call fn for each; the first failure is that of all, as in the standard library."""
    return [fn(*args) for args in batch]
