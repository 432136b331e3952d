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
        _issue(reactor, None)


def issue_now(future: Future[Any]) -> None:
    """Issue the callbacks of one future that is done, now or right after the present callback."""
    if _issuing.active:
        _issuing.later.append(future)
    else:
        _issue(None, future)


def _issue(reactor: Optional[Reactor], future: Optional[Future[Any]]) -> None:
    here = _issuing
    here.active = True
    try:
        while True:
            if future is not None:
                _issue_of(future)
            if here.later:
                future = here.later.popleft()
            elif reactor is not None:
                with reactor.lock:
                    if not reactor.ready:
                        return
                    future = reactor.ready.popleft()
            else:
                return
    finally:
        here.active = False
        # A callback failed before these had their turn: the next observer takes them up.
        while here.later:
            left = here.later.popleft()
            with left._reactor.lock:
                left._reactor.ready.append(left)


def _issue_of(future: Future[Any]) -> None:
    """Issue the callbacks of one future until none is left, unless another thread is at it."""
    lock = future._reactor.lock
    with lock:
        if future._issuing:
            return
        future._issuing = True
    try:
        while True:
            with lock:
                if not future._callbacks:
                    # Under the lock: who registers after this finds nobody issuing.
                    future._issuing = False
                    return
                seqno, fn, args, kwargs = future._callbacks.popleft()
            try:
                fn(*args, **kwargs)
            except CallbackRaised:
                raise
            except Exception as error:
                raise CallbackRaised(seqno) from error
    except BaseException:
        with lock:
            future._issuing = False
            if future._callbacks:
                future._reactor.ready.appendleft(future)
        raise
