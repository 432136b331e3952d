# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Whether a worker was born with what a later job refers to.

A notebook or an interactive session goes on defining functions and classes in its main module, and
defining them again. They are pickled by name, and a worker that was forked before has nothing by
that name, or worse, what had it then. So each is noted when a job first calls it or has it among
its arguments, and goes to workers only that are forked later. What is deeper inside of arguments is
not looked at, and other modules are taken for finished once they are imported.
"""

from __future__ import annotations

import math
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, ref

from jobserver._dump import _PLAIN
from jobserver._worker._task import Task

_births = 0
_first: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_known: dict[Any, int] = getattr(_first, "data")  # noqa: B009  # which the types do not tell


def birth(task: Task) -> int:
    """Return the number of a worker that is about to be forked for a job."""
    global _births  # noqa: PLW0603
    youth(task.fn, task.args)
    _births += 1
    return _births


def youth(fn: Any, args: tuple[Any, ...]) -> float:
    """Return the number of the youngest worker that may be too old for a call; -1 for none."""
    found: float = -1
    for thing in (fn, *args):
        if type(thing) in _PLAIN:
            continue
        while isinstance(thing, partial):
            thing = thing.func  # noqa: PLW2901
        if getattr(thing, "__module__", None) != "__main__":
            continue
        # A function is in there itself, if anything of it is.
        known = _known.get(ref(thing)) if type(thing) is FunctionType else None
        noted = _youth_of(thing) if known is None else known
        found = max(found, noted)
    return found


def _youth_of(thing: Any) -> float:
    thing = getattr(thing, "__func__", thing)
    if not (isinstance(thing, type) or hasattr(thing, "__code__")):
        thing = type(thing)
    try:
        return _first.setdefault(thing, _births)
    except TypeError:  # of a metaclass that makes no hash
        return math.inf
