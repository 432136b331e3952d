# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Which calls of an executor may stand in its queue, and their pickles.

Each call has a pickle of its own, as two calls that were given one object must not share it in a
worker. What cannot be pickled just so, what has descriptors or large buffers, and what is to find a
worker that is younger than others is handed over by itself instead.
"""

from __future__ import annotations

import math
import pickle
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Optional

from ._backlog import Backlog, Call
from ._dump import _PLAIN
from ._launch._births import youth
from ._launch._pickling import refusing_descriptors
from ._worker._log import Small

if TYPE_CHECKING:
    from ._calls import Calls
    from ._pledge import Pledge

#: So many calls are put into the queue at a time.
PORTION = 256

# A call whose pickle is longer is handed over by itself.
_LARGEST = 1 << 14
_SIMPLE = (FunctionType, BuiltinFunctionType)
_SIZED = (bytes, bytearray, str)


def is_plain(call: Call) -> bool:
    """Say whether pickling a call runs no code of the user's, and is done in no time."""
    if call.kwargs or type(call.fn) not in _SIMPLE:
        return False
    for arg in call.args:
        kind = type(arg)
        if kind not in _PLAIN or (kind is str and len(arg) > _LARGEST):
            return False
    return True


class Packing:
    """
    Makes calls of the backlog ready for the queue.

    Args:
        backlog: Where the calls are, and stay.
        forks: Whether workers are forked, and so know the main module as it was then.
        interruptible: Whether Ctrl-C amid pickling is to come through.
    """

    def __init__(self, backlog: Backlog, *, forks: bool, interruptible: bool) -> None:
        self._backlog = backlog
        self._forks = forks
        self._interruptible = interruptible
        self._small = Small()

    def portion(self, calls: Calls) -> list[tuple[Pledge, Call, bytes]]:
        """Return the first calls of the backlog that may go into the queue, with their pickles."""
        with refusing_descriptors():
            return self._portion(calls)

    def _portion(self, calls: Calls) -> list[tuple[Pledge, Call, bytes]]:
        packed = []
        oldest = min((each.born for each in calls.drains.values()), default=math.inf)
        known, young = None, 0.0
        for promise, call in self._backlog.peek(PORTION):
            pickled = None if promise.alone else self._pickle(call)
            if pickled is None:
                promise.alone = True
                break
            if self._forks:
                if call.args or call.fn is not known:
                    known, young = call.fn, _youth(call)
                if young >= oldest:
                    break  # those who drain may not know what it refers to
                calls.youth = max(calls.youth, young)
            packed.append((promise, call, pickled))
        return packed

    def _pickle(self, call: Call) -> Optional[bytes]:
        fn, args, kwargs, ledger = call
        if ledger is not None:
            return None
        for arg in args:
            if type(arg) in _SIZED and len(arg) > _LARGEST:
                return None
        try:
            whole = (fn, args, kwargs)
            pickled = pickle.dumps(whole, 5) if is_plain(call) else self._small.dumps(whole)
        except BaseException as error:
            if self._interruptible and not isinstance(error, Exception):
                raise
            return None  # told where it is handed over by itself
        return pickled if len(pickled) <= _LARGEST else None


def _youth(call: Call) -> float:
    try:
        return youth(call.fn, call.args)
    except Exception:  # noqa: BLE001  # of an attribute; told where the call is handed over
        return math.inf
