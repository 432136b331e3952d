# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Issue the callbacks of futures that are done, on the thread that observes it.

Guarantees:

* A future's callbacks start in the order in which they were registered, one at a time.
* A callback never runs inside another: what becomes due meanwhile, on the same thread, is issued
  when the present one has returned. So chains of callbacks need no stack.
* A failed callback stops the issuing: the rest is issued by the next call that observes.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Optional

from ._errors import CallbackRaised
from ._signals import deferred, lifted

if TYPE_CHECKING:
    from ._future import Future
    from ._reactor import Reactor


class _Issuing(threading.local):
    active = False

    def __init__(self) -> None:
        self.later: deque[Future[Any]] = deque()


_issuing = _Issuing()


def start_afresh() -> None:
    """In a new worker: it may have been forked from within a callback, and is in none."""
    if _issuing.active:
        _issuing.active = False
        _issuing.later = deque()


def issuing() -> bool:
    """Say whether this thread is inside a callback."""
    return _issuing.active


def issue_due(reactor: Reactor) -> None:
    """Issue all callbacks that are due; raises CallbackRaised for the first that fails."""
    if reactor.ready and not _issuing.active:
        with lifted():
            _issue(reactor, None)


def issue_now(future: Future[Any]) -> None:
    """Issue the callbacks of one future that is done, now or right after the present callback."""
    if _issuing.active:
        _issuing.later.append(future)
    else:
        _issue(None, future)


def _issue(reactor: Optional[Reactor], future: Optional[Future[Any]]) -> None:
    here, at = _issuing, [future]
    try:
        here.active = True
        if reactor is not None:
            reactor.unload()
        _issue_in_turn(here, reactor, at)
    finally:
        here.active = False
        # A callback failed: the next observer takes up the rest.
        if at[0] is not None:
            _queue(at[0], first=True)
        while here.later:
            _queue(here.later.popleft())


def _issue_in_turn(
    here: _Issuing, reactor: Optional[Reactor], at: list[Optional[Future[Any]]]
) -> None:
    """
    Issue the callbacks of the future that is in ``at``, and of those that follow it there.

    A function of its own, as ``_map.ending`` says: Ctrl-C in the loop must not pass the `finally`.
    """
    while True:
        if at[0] is not None:
            _issue_of(at[0])
        with deferred():  # else Ctrl-C could find one that is in no queue, and here neither
            at[0] = _next(here, reactor)
        if at[0] is None:
            return


def _next(here: _Issuing, reactor: Optional[Reactor]) -> Optional[Future[Any]]:
    if here.later:
        return here.later.popleft()
    if reactor is None:
        return None
    with deferred(), reactor.lock:
        return reactor.ready.popleft() if reactor.ready else None


def _queue(future: Future[Any], *, first: bool = False) -> None:
    reactor = future._reactor
    with deferred(), reactor.lock:
        if future._callbacks:
            (reactor.ready.appendleft if first else reactor.ready.append)(future)


def _issue_of(future: Future[Any]) -> None:
    """Issue the callbacks of one future until none is left, unless another thread is at it."""
    lock = future._reactor.lock
    mine = False
    try:
        while True:
            with deferred(), lock:
                if future._issuing and not mine:
                    return
                mine = future._issuing = True
                if not future._callbacks:
                    # Under the lock: who registers after this finds nobody issuing.
                    future._issuing = mine = False
                    return
                seqno, fn, args, kwargs = future._callbacks.popleft()
            try:
                fn(*args, **kwargs)
            except CallbackRaised:
                raise
            except Exception as error:
                raise CallbackRaised(seqno) from error
    finally:
        if mine:
            future._issuing = False
