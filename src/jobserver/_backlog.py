# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The calls of an executor, or of a map, that wait for a slot."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import nullcontext
from itertools import islice
from typing import Any, Callable, ContextManager, NamedTuple, Optional

from ._check import check_pause
from ._pledge import Pledge
from ._signals import deferred
from ._worker._ledger import Ledger


class Call(NamedTuple):
    """What is to be called."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ledger: Optional[Ledger] = None  # which its worker is to have

    def handed_over(self) -> ContextManager[None]:
        """Return the context in which to start the worker."""
        return nullcontext() if self.ledger is None else self.ledger.handed_over()


class Backlog:
    """
    Pending promises and their calls, first come, first served.

    Guarantees:

    * Whoever takes a promise out, and nobody else, settles it.
    * No code of the user runs under the lock; and the lock is reentrant, as the garbage collector
      may come by, and cancel something, while it is held.

    Args:
        gate: The sleep_fn that is asked once about each call before a slot is taken for it.
    """

    def __init__(self, gate: Optional[Callable[[], Optional[float]]]) -> None:
        self.lock = threading.RLock()
        self._gate = gate
        self._calls: OrderedDict[Pledge, Call] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, promise: Pledge) -> bool:
        return promise in self._calls

    def peek(self, count: int) -> list[tuple[Pledge, Call]]:
        """Return the first so many, which stay where they are."""
        with deferred(), self.lock:
            return list(islice(self._calls.items(), count))

    def put_back(self, calls: list[tuple[Pledge, Call]]) -> None:
        """Put calls, in their order, ahead of all others."""
        with deferred(), self.lock:
            for promise, call in reversed(calls):
                self._calls[promise] = call
                self._calls.move_to_end(promise, last=False)

    def add(self, promise: Pledge, call: Call) -> bool:
        """Put a call at the end, under the lock; says whether it is the only one."""
        self._calls[promise] = call
        return len(self._calls) == 1

    def remove(self, promise: Pledge) -> bool:
        """Take a promise out, wherever it is; False if somebody else has."""
        with deferred(), self.lock:
            return self._calls.pop(promise, None) is not None

    def cut_off(self, promises: list[Pledge]) -> None:
        """Take out what is there."""
        with deferred(), self.lock:
            for promise in promises:
                del self._calls[promise]

    def cut(self, keep: int) -> list[Pledge]:
        """Take out all but the first ``keep``; the first of these is the last returned."""
        with deferred(), self.lock:
            return [self._calls.popitem()[0] for _ in range(len(self._calls) - keep)]

    def first(self) -> Optional[Pledge]:
        """Return the next promise."""
        with deferred(), self.lock:
            return next(iter(self._calls), None)

    def head(self) -> Optional[Pledge]:
        """Return the next promise, after asking the gate about it if it is time to."""
        while True:
            head = self.first()
            if head is None or head.admitted or head.asks_at > time.monotonic():
                return head
            try:
                pause = None if self._gate is None else check_pause(self._gate())
            except BaseException as error:  # noqa: BLE001  # told to the call that it was asked for
                self.fail(head, error.with_traceback(None))
                continue
            if pause is None:
                head.admitted = True
            else:
                head.asks_at = time.monotonic() + pause

    def take(self) -> Optional[tuple[Pledge, Call]]:
        """Take out the next call and make it running; None if there is none that may run."""
        while True:
            with deferred(), self.lock:
                head = next(iter(self._calls), None)
                if head is None or not head.admitted:
                    return None
                call = self._calls.pop(head)
            if head.told():
                return head, call

    def fail(self, promise: Pledge, error: BaseException) -> None:
        """Fail one call, unless it is cancelled or running already."""
        if self.remove(promise) and promise.told():
            promise.resolve(None, error)

    def fail_all(self, error: BaseException) -> None:
        """Fail every call."""
        for promise in reversed(self.cut(0)):
            if promise.told():
                promise.resolve(None, error)
