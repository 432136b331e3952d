# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
``Jobserver.map`` with single calls and warm workers, which take the calls from a queue.

To hand over each call by itself costs several times what most workers take for a short one. So the
calls go the way of an executor's (see ``_calls`` and ``_runs``), and the thread that iterates does
what the executor's thread does there.

Guarantees:

* The thread works on it while it waits for a result, and before each result that it yields: a slot
  that is free meanwhile gets to work. Between two results it is in code of the user's, and workers
  go on with what is in the queue.
* What is in the queue when the iteration is left is made by nobody: it had no slot.
* After the last result all slots are free, as after that of any other map.
* No input is read while calls of earlier ones wait, unless reading runs no code of the user's; and
  no result is unpickled before its turn.
* In a job, or beside a slot that this thread holds, calls are handed over one by one, as that is
  where slots are lent (see ``_map``).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Callable, Optional

from . import _forking
from ._admission import TICK
from ._backlog import Backlog, Call
from ._errors import Blocked, CallbackRaised
from ._map import Late, Telling, ending, raising, reclaim
from ._packing import PORTION
from ._patience import Patience
from ._pledge import AS_THEY_ARE, Slip
from ._runs import Runs
from ._signals import deferred
from ._slots._held import current_slot

# How long a slot may be idle at most while results are yielded, if the user asks for the next one.
_TURN = 0.001
# Not to look more often than this, in seconds.
_LEAST = 0.001

if TYPE_CHECKING:
    from ._inputs import Inputs
    from ._jobserver import Jobserver
    from ._slots._lease import Lease


class QueueRun:
    """
    One map, in the thread that iterates over it.

    Args:
        jobserver: Has workers that run any number of jobs, and no defaults for submissions.
        fn: What to call.
        inputs: What to call it with.
        room: None, or how many calls may be outstanding.
        deadline: The ``time.monotonic`` instant at which to give up.
    """

    def __init__(
        self,
        jobserver: Jobserver,
        fn: Callable[..., Any],
        inputs: Inputs,
        room: Optional[int],
        deadline: Optional[float],
    ) -> None:
        self._shared = jobserver._shared
        self._canary = self._shared.canary()  # the pool is in use, also without any other handle
        self._fn = fn
        self._inputs = inputs
        self._room = room
        self._deadline = deadline
        self._epoch = _forking.epoch()
        self._backlog = Backlog(None)
        self._runs = Runs(jobserver, None, self._backlog, Patience(jobserver), AS_THEY_ARE)
        self._order: deque[Slip] = deque()
        self._look_at = math.inf  # when to look how far workers are
        self._next = 0.0  # when to see whether there is something to start, between results
        self._read = False  # all inputs
        self._error: Optional[Exception] = None  # of an input; told before anything is waited for
        self._telling = Telling(self._leave)

    def steps(self) -> Iterator[Iterable[Any]]:
        """Submit, wait, and yield results, as many at a time as there are."""
        return ending(self._steps(), self._telling)

    def _steps(self) -> Iterator[Iterable[Any]]:
        order = self._order
        while True:
            self._feed()
            if self._error is not None and not (order and order[0].done):
                raise self._error
            try:
                if not order:
                    if self._is_over():
                        return
                    continue
                if not order[0].done:
                    self._wait()
                elif time.monotonic() >= self._next:
                    self._keep_up()
            except CallbackRaised as error:
                yield raising(error)
                continue
            if order[0].done:
                yield self._telling.of(self._values())
                if self._telling.over:
                    return

    def _values(self) -> Iterator[Any]:
        """Yield what is done, for as long as nothing else is to be done."""
        order = self._order
        while order and order[0].done:
            slip = order.popleft()
            yield slip.take()
            del slip
            if time.monotonic() >= self._next:
                return

    def _feed(self) -> None:
        """Read inputs, a portion ahead of the workers or as far as there is room."""
        count, least = PORTION - len(self._backlog), PORTION // 2
        if self._room is not None:
            count = min(count, self._room - len(self._order))
            least = min(least, 1 + self._room // 4)
        if count < 1 or self._read:
            return
        if not self._inputs.at_hand or count < least:
            # What waits may be what the next input is waiting for, once it is asked for.
            if (self._order and self._order[0].done) or self._runs.counts()[0]:
                return
            count = count if self._inputs.at_hand else 1
        try:
            found = self._inputs.take(count)
        except Exception as error:  # noqa: BLE001  # whatever an iterable of the user's raises
            self._error, found = error, None
        if found is None:
            self._read = True
            return
        argses, kwargses = found
        kwargs_of = itertools.repeat({}) if kwargses is None else kwargses
        fn, order, backlog = self._fn, self._order, self._backlog
        with deferred(), backlog.lock:
            for args, kwargs in zip(argses, kwargs_of):
                slip = Slip()
                order.append(slip)
                backlog.add(slip, Call(fn, args, kwargs))

    def _wait(self) -> None:
        """Give a slot to work, or wait for what has one."""
        shared, runs = self._shared, self._runs
        if self._epoch != _forking.epoch():
            raise RuntimeError("this map belongs to the process that this one was forked from")
        if self._wants():
            shared.refuse_closed()
            self._place(wait=True)
        elif runs.jobs:
            tick = self._until_look()
            job = next(iter(runs.jobs))
            if not shared.admission.wait_for(job, self._deadline, self._due, tick):
                raise Late
        self._note()

    def _is_over(self) -> bool:
        """Wait, once all has been yielded, for workers that came too late to find a call."""
        runs = self._runs
        if not runs.jobs or self._epoch != _forking.epoch():
            return True
        if not self._shared.admission.wait_for(next(iter(runs.jobs)), self._deadline):
            return True
        self._note()
        return False

    def _keep_up(self) -> None:
        """Between two results: see what has ended, and have free slots work."""
        shared = self._shared
        self._next = math.inf
        if self._epoch != _forking.epoch() or shared.closed:
            return  # what there is is yielded all the same
        self._place(wait=False)
        self._note()

    def _wants(self) -> bool:
        self._backlog.head()  # asks whether it may start, and nobody minds
        self._runs.fill()
        return self._runs.wanted()

    def _place(self, *, wait: bool) -> None:
        """Start what there are slots for; wait for one, as long as nothing else is to be done."""
        shared = self._shared
        taken: list[Lease] = []
        with deferred():
            try:
                shared.admission.reap_keeping()
                if wait:
                    self._take(taken)
                self._start_all(taken)
            except BaseException:
                shared.admission.give_all_back(taken, unheard=True)
                raise
            if current_slot(shared.slots).lent:
                shared.admission.regain()

    def _take(self, taken: list[Lease]) -> None:
        tick = self._until_look()
        try:
            self._shared.admission.take(
                taken, self._deadline, None, self._due, TICK if tick is None else tick
            )
        except Blocked:
            raise Late from None

    def _start_all(self, taken: list[Lease]) -> None:
        """Start something on what was taken, and on what is free."""
        shared = self._shared
        while True:
            if taken:
                self._runs.start(taken.pop())
            if not self._wants():
                return
            with shared.reactor.lock, suppress(OSError):  # who waits for a slot tells that
                lease = shared.reactor.crew.try_take()
                if lease is not None:
                    taken.append(lease)
            if not taken:
                return

    def _until_look(self) -> Optional[float]:
        """Return in how many seconds to look how far workers are; None for not at all."""
        look_at = self._runs.next_look()
        self._look_at = math.inf if look_at is None else look_at
        if self._look_at == math.inf:
            return None
        return min(max(self._look_at - time.monotonic(), _LEAST), TICK)

    def _due(self) -> bool:
        # Not what `next_look` says now: while a call is lost, that is always a while from now.
        return bool(self._runs.sink) or time.monotonic() >= self._look_at

    def _note(self) -> None:
        """Take note of what has been made."""
        runs = self._runs
        self._shared.reactor.unload()  # what follows is code of the user's
        while runs.sink:
            runs.complete(runs.sink.popleft())
        runs.look()
        self._next = time.monotonic() + _TURN

    def _leave(self) -> None:
        self._order.clear()
        if self._epoch == _forking.epoch():
            self._runs.abandon()
            reclaim(self._shared)
