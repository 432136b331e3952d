# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The calls of one map, cut into batches, and what has become of them, in order.

Guarantees:

* A call is in one batch at a time, and is made at most once: what is made again is what no worker
  has begun (see ``_worker._ledger``).
* What a call has come to is told apart from what its neighbours have: values, exceptions, deaths.
* Batches of a size that the user has chosen are made, and fail, as they are. In a map that chooses
  by itself (``pace``) what a worker gives back, or leaves behind when it dies, is cut anew.

Not thread-safe; nothing here blocks.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import Any, Callable, Optional

from ._batch import LOOK, Batch, Ending
from ._inputs import Inputs
from ._pace import PATIENCE, Pace
from ._worker._chunk import Done, run_chunk
from ._worker._ledger import Ledger

#: A function, its arguments and keyword arguments.
Parts = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Batches:
    """
    The batches of one map.

    Args:
        fn: What to call.
        inputs: What to call it with.
        size: How many calls go to a worker; None to find out.
        room: None, or how many submissions may be outstanding; calls, where the size is found out.
        bare: A batch of one call may be submitted as just that call.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Inputs,
        size: Optional[int],
        room: Optional[int],
        *,
        bare: bool,
    ) -> None:
        self._fn = fn
        self._inputs = inputs
        self._size = size
        self._room = room
        self._bare = bare
        self._pace = Pace()
        self._waiting: list[Batch] = []  # cut off from others
        self._outstanding = 0  # calls that were read, less those of batches that are over
        self._robbed = 0.0  # when it was last tried to take calls away
        self.order: deque[Batch] = deque()

    @property
    def several(self) -> bool:
        """Whether a batch may have more than one call."""
        return self._size != 1

    @property
    def at_hand(self) -> bool:
        """Whether the next batch is there without code of the user's."""
        return bool(self._waiting) or self._inputs.at_hand

    @property
    def head(self) -> Optional[Batch]:
        """The batch whose results come next."""
        return self.order[0] if self.order else None

    def pop(self) -> None:
        """Let go of the head, which is over."""
        head = self.order.popleft()
        self._outstanding -= head.stop
        head.close()

    def next(self, slots: int, *, read: bool = True) -> Optional[Batch]:
        """
        Return the batch to submit next; None if there is none, or no room for it.

        Args:
            slots: How many may run at once.
            read: Whether it may be one of inputs that have not been read yet.
        """
        if self._waiting:
            batch = min(self._waiting, key=self.order.index)
            count = 1 if batch.alone else self._pace.next(batch.stop, slots)
            if count < batch.stop:
                self._put_back(batch, count)
            self._waiting.remove(batch)
            return batch
        count = self._count(slots) if read else 0
        found = self._inputs.take(count) if count else None
        if found is None:
            return None
        batch = Batch(*found)
        self.order.append(batch)
        self._outstanding += batch.stop
        return batch

    def _count(self, slots: int) -> int:
        if self._size is not None:
            return self._size if self._room is None or len(self.order) < self._room else 0
        if self._room is None:
            return self._pace.next(self._inputs.left, slots)
        head = self.head
        free = self._room - self._outstanding + (0 if head is None else head.taken)
        return min(free, self._pace.next(self._room, slots))

    def _put_back(self, batch: Batch, start: int) -> Batch:
        rest = batch.split(start)
        self.order.insert(self.order.index(batch) + 1, rest)
        self._waiting.append(rest)
        return rest

    def parts(self, batch: Batch) -> Parts:
        """
        Return what to submit: a function, its arguments and keyword arguments.

        Raises:
            OSError: There is no descriptor for it; nothing has happened.
        """
        kwargses = batch.kwargses
        # A call by itself leaves no word of how long it took; while that is sought, it is a batch.
        known = self._size is not None or batch.alone or self._pace.size > 1
        if batch.stop == 1 and self._bare and known and batch.ledger is None:
            return self._fn, batch.argses[0], {} if kwargses is None else kwargses[0]
        batch.ledger = batch.ledger or Ledger(batch.stop)
        patience = PATIENCE if self._size is None else None
        singles = batch.singles()
        argses = batch.argses if singles is None else singles
        parts = self._fn, argses, kwargses, batch.ledger, patience, singles is not None
        return run_chunk, parts, {}

    def submitted(self, batch: Batch, future: Any) -> None:
        """Take note that a batch runs."""
        batch.running = True
        batch.future = future
        batch.begun = time.monotonic()

    def settle(self, batch: Batch, outcome: Ending) -> None:
        """Take note of how the worker of a batch has ended; others may be waiting after that."""
        if batch.ledger is None:
            batch.end((), 0, outcome)
            return
        shared, ends = self._size is None, batch.ledger.ends()
        done = None
        with contextlib.suppress(BaseException):  # it is raised where it belongs
            done = outcome.get()
        if isinstance(done, Done):
            made = stop = done.made
            self._pace.note(batch.stop, made, done.seconds)
        else:
            made = batch.made(ends)
            if made == batch.stop and not outcome.died:
                made -= 1  # what wraps the calls has failed after the last of them
            stop = min(made + 1, batch.stop)
        begun = made or (stop and batch.ledger.begun())
        if shared and batch.ledger.count > 1 and not begun:
            # No call has begun. If that is due to one of them, it is to be known to which.
            batch.alone, batch.running = True, False
            batch.close()
            self._waiting.append(batch)
            return
        if shared and stop < batch.stop:
            self._put_back(batch, stop)
        batch.stop = stop
        batch.end(ends, made, outcome if made < stop else None)

    def fail(self, batch: Batch, ending: Ending) -> None:
        """Let a batch end like that, after the calls that have been made."""
        if batch.running and batch.ledger is not None:
            ends = batch.ledger.ends()
            batch.end(ends, batch.made(ends), ending)
        else:
            batch.end((), 0, ending)

    def defer(self, batch: Batch) -> None:
        """Put a batch back that could not be submitted."""
        self._waiting.append(batch)

    def give_up(self, ending: Ending) -> None:
        """Let what has not been submitted end like that."""
        for batch in self._waiting:
            batch.end((), 0, ending)
        self._waiting.clear()

    def can_rob(self) -> bool:
        """Say whether it may be worth it to take calls away from batches that run."""
        return (
            self._size is None
            and time.monotonic() >= self._robbed + LOOK
            and any(batch.running and batch.stop > 1 for batch in self.order)
        )

    def rob(self) -> bool:
        """Take calls away from the batch with the most to do; says whether there are some now."""
        now = self._robbed = time.monotonic()
        best, most = None, 0.0
        for batch in self.order:
            if batch.running and batch.ledger is not None and now > batch.begun + LOOK:
                if not batch.ledger.begun():
                    continue  # another one would take as long to begin
                made = batch.made(batch.ledger.ends())
                left = (now - batch.begun) / (made + 1) * (batch.stop - made - 1)
                if left > max(most, LOOK / 2):
                    best, most = batch, left
        if best is None or best.ledger is None:
            return False
        made, stop = best.made(best.ledger.ends()), best.stop
        start = made + 1 + (stop - made - 1) // 2
        while start < stop:
            if best.ledger.take_away(start, stop):
                self._put_back(best, start)
                return True
            start += (stop - start + 1) // 2
        return False

    def withdraw(self) -> None:
        """Have calls that no worker has begun not made, if the sizes were not chosen for them."""
        if self._size is not None:
            return
        for batch in self.order:
            ledger = batch.ledger
            if not batch.running or ledger is None:
                continue
            start = batch.made(ledger.ends()) + 1
            while start < batch.stop and not ledger.take_away(start, batch.stop):
                start += (batch.stop - start + 1) // 2

    def close(self) -> None:
        """Let go of everything."""
        for batch in self.order:
            batch.close()
        self.order.clear()
        self._waiting.clear()
