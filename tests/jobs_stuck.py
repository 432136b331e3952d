# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs of a module that, where it is told to, is being imported for a long time."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path

from helpers import touch, wait_until


class _Thing:
    pass


def _stay(_gone: object) -> None:
    # What is raised in here is printed, and no more.
    directory = os.environ["STUCK_IN"]
    touch(os.path.join(directory, "stuck"))
    wait_until(Path(directory, "go on").exists, "the end of the test")


if "STUCK_IN" in os.environ:
    _thing = _Thing()
    _reference = weakref.ref(_thing, _stay)
    del _thing


def stuck() -> None:
    """Nothing, once this module is imported."""


def handler_of(number: int) -> str:
    """The name of the handler of a signal."""
    handler = signal.getsignal(number)
    return getattr(handler, "__name__", str(handler))
