# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Parametrisation that the tests share; apart from helpers.py, which every worker imports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable


def by_method(name: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test that takes `method` with further values, one or several names.

    All values under fork and forkserver. Under spawn, where starting a worker takes longer than
    most tests, the first value only: what the others vary does not depend on the launch.
    """
    chosen = [value if "," in name else (value,) for value in values]
    names = ["method", *(part.strip() for part in name.split(","))]
    cases = [(method, *value) for method in ("fork", "forkserver") for value in chosen]
    return pytest.mark.parametrize(names, [*cases, ("spawn", *chosen[0])])
