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
from typing import Any
from weakref import WeakKeyDictionary

from jobserver._dump import _PLAIN
from jobserver._worker._task import Task

_births = 0
_first: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def birth(task: Task) -> int:
    """Return the number of a worker that is about to be forked for a job."""
    global _births  # noqa: PLW0603
    younger(task, 0)
    _births += 1
    return _births


def younger(task: Task, born: int) -> bool:
    """Say whether what a job refers to may be younger than the worker of that number."""
    return youth(task.fn, task.args) >= born


def youth(fn: Any, args: tuple[Any, ...]) -> float:
    """Return the number of the youngest worker that may be too old for a call; -1 for none."""
    found: float = -1
    for thing in (fn, *args):
        if type(thing) in _PLAIN:
            continue
        while isinstance(thing, partial):
            thing = thing.func  # noqa: PLW2901
        if getattr(thing, "__module__", None) == "__main__":
            found = max(found, _youth_of(thing))
    return found


def _youth_of(thing: Any) -> float:
    thing = getattr(thing, "__func__", thing)
    if not (isinstance(thing, type) or hasattr(thing, "__code__")):
        thing = type(thing)
    try:
        return _first.setdefault(thing, _births)
    except TypeError:  # of a metaclass that makes no hash
        return math.inf
