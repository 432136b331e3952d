# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``Jobserver.map``: submit batches as the results are iterated over."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Protocol, Union

from ._batch import Batch
from ._batches import Batches
from ._callbacks import issuing
from ._errors import Blocked, CallbackRaised
from ._future import Future
from ._signals import Deferred, deferred
from ._worker._task import Task

if TYPE_CHECKING:
    from ._shared import Shared
    from ._slots._lease import Lease


class Late(Exception):
    """The timeout is over; apart from the Blocked that fn itself may raise."""


class Plan(NamedTuple):
    """What is the same for every submission of one map."""

    env: dict[str, Optional[str]]
    preexec_fn: Optional[Callable[[], Any]]
    sleep_fn: Optional[Callable[[], Optional[float]]]
    lends: bool
    deadline: Optional[float]


def check_size(chunksize: Union[int, str]) -> Optional[int]:
    """Return how many calls go to a worker; None for ``"auto"``."""
    if isinstance(chunksize, str):
        if chunksize != "auto":
            raise ValueError(f"chunksize must be an int or 'auto', not {chunksize!r}")
        return None
    _check_size("chunksize", chunksize)
    return chunksize


def check_buffersize(buffersize: Optional[int]) -> None:
    """Refuse what is neither None nor an int >= 1."""
    if buffersize is not None:
        _check_size("buffersize", buffersize)


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, not {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be >= 1, not {size}")


class Run:
    """
    One map, in the thread that iterates over it.

    What is there is yielded before anything is waited for; and with more than one call in a batch,
    a slot that is free gets its next batch before the results of the last one are yielded.
    """

    def __init__(self, shared: Shared, plan: Plan, batches: Batches) -> None:
        self._shared = shared
        self._canary = shared.canary()  # the pool is in use, also without any other handle
        self._plan = plan
        self._batches = batches
        self._futures: dict[Future[Any], Batch] = {}
        self._ended: deque[Future[Any]] = deque()
        self._next: Optional[Batch] = None  # cut, and not submitted yet
        self._admitted = False  # the sleep_fn has let it in
        self._error: Optional[Exception] = None  # of an input; told when it is that one's turn
        self._telling = Telling(self._leave)

    def steps(self) -> Iterator[Iterable[Any]]:
        """Submit, wait, and yield results, as many at a time as there are."""
        return ending(self._steps(), self._telling)

    def _steps(self) -> Iterator[Iterable[Any]]:
        while True:
            self._settle()
            head = self._batches.head
            if head is not None and head.look():
                try:
                    self._refill()
                except CallbackRaised as error:
                    yield raising(error)
                yield self._telling.of(head.results())
                if self._telling.over:
                    return
                if head.ended:
                    self._batches.pop()
            else:
                try:
                    if not self._go_on(head):
                        return
                except CallbackRaised as error:
                    yield raising(error)

    def _leave(self) -> None:
        self._futures.clear()
        self._batches.withdraw()
        self._batches.close()
        reclaim(self._shared)

    def _settle(self) -> None:
        while self._ended:
            future = self._ended.popleft()
            assert future._outcome is not None  # noqa: S101  # that is why it is here
            self._batches.settle(self._futures.pop(future), future._outcome)

    def _refill(self) -> None:
        shared = self._shared
        if not self._batches.several or self._plan.sleep_fn is not None or shared.closed:
            return
        shared.reactor.reap(keep=True)
        free = self._free()
        if self._next is None and not self._batches.at_hand:
            shared.reactor.unload()  # the inputs are code of the user's, too
        try:
            if free and self._cut() is not None:
                self._submit(time.monotonic(), None)
        except CallbackRaised:
            raise
        except (Late, _NoLedger):
            pass  # there is none to be had at once
        except Exception as error:  # noqa: BLE001  # of an input, or of pickling it
            if self._next is None:
                self._error = error  # else it is tried again
        shared.reactor.unload()  # what follows is code of the user's

    def _free(self) -> bool:
        """Whether there is a free slot: in the pool, or still with a worker that is done."""
        shared = self._shared
        return bool(shared.reactor.crew.loaded or shared.slots.free())

    def _cut(self) -> Optional[Batch]:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._next is None:
            self._next = self._batches.next(self._shared.slots.slots)
        return self._next

    def _go_on(self, head: Optional[Batch]) -> bool:
        """Submit a batch, or wait for the head; says whether there is anything left to do."""
        if self._cut() is None:
            if head is None:
                return False
        else:
            try:
                self._submit(self._plan.deadline, head)
            except _NoLedger as error:
                # One comes free with the next batch that ends.
                head = next((batch for batch in self._batches.order if batch.running), None)
                if head is None:
                    raise error.why from None
                self._wait(head, several=False)
            return True
        self._wait(head, several=self._batches.several)
        return True

    def _wait(self, head: Batch, *, several: bool) -> None:
        future = head.future
        assert future is not None  # noqa: S101  # what is not submitted is cut before
        early = functools.partial(self._early, head) if several else None
        if not self._shared.admission.wait_for(future, self._plan.deadline, early):
            raise Late
        if several and self._batches.can_rob() and self._free():
            self._batches.rob()

    def _early(self, head: Batch) -> bool:
        """Whether there is something to do though the head has not ended."""
        return head.look() or (self._batches.can_rob() and self._free())

    def _submit(self, deadline: Optional[float], head: Optional[Batch]) -> None:
        """Submit what has been cut, unless the head is done before there is a slot."""
        shared, plan, batch = self._shared, self._plan, self._next
        assert batch is not None  # noqa: S101
        shared.refuse_closed()
        until, early = None, None
        if head is not None and head.running:
            # Its results are yielded first, then we try again.
            until, early = head.future, head.look if self._batches.several else None
        try:
            task = Task(*self._batches.parts(batch), plan.env, plan.preexec_fn)
        except OSError as error:
            raise _NoLedger(error) from None
        with deferred() as signals:
            self._place(signals, batch, task, deadline, until, early)

    def _place(
        self,
        signals: Deferred,
        batch: Batch,
        task: Task,
        deadline: Optional[float],
        until: Optional[Future[Any]],
        early: Optional[Callable[[], bool]],
    ) -> None:
        shared, plan = self._shared, self._plan
        taken: list[Lease] = []
        try:
            shared.admission.reap_keeping()
            with contextlib.nullcontext() if batch.ledger is None else batch.ledger.handed_over():
                try:
                    if plan.sleep_fn is not None and not self._admitted:
                        with signals.lifted():
                            shared.admission.gate(plan.sleep_fn, deadline)
                        self._admitted = True
                    shared.admission.take(taken, deadline, until, early)
                except Blocked:
                    raise Late from None
                if not taken:
                    return
                future = shared.start(task, taken, lends=plan.lends)
        except BaseException:
            shared.admission.give_all_back(taken, unheard=True)
            raise
        self._next, self._admitted = None, False
        self._batches.submitted(batch, future)
        self._futures[future] = batch
        with shared.reactor.lock:
            if future._outcome is None:
                future._sink = self._ended
            else:
                self._ended.append(future)


class Telling:
    """
    The results that a map is just yielding, and its end.

    Args:
        leave: What is to be done at the end; it is done once.
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._values: Optional[Iterator[Any]] = None
        self.over = False

    def of(self, values: Iterable[Any]) -> Iterator[Any]:
        """Return the values; the first that raises is the end of the map."""
        self._values = found = self._told(values)
        return found

    def _told(self, values: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from values
        except BaseException:
            self._values = None
            self.leave()
            raise
        self._values = None

    def leave(self) -> None:
        """
        The map ends here, whatever has been yielded of it.

        If Ctrl-C comes out of this, it may have done nothing yet: call it once more.
        """
        with deferred():
            if self.over:
                return
            self.over = True
            values: Any = self._values
            self._values = None
            if values is not None:
                values.close()
            self._leave()


class Steps(Protocol):
    """One map, to be iterated over."""

    def steps(self) -> Iterator[Iterable[Any]]:
        """Submit, wait, and yield results, as many at a time as there are."""
        ...


def ending(steps: Iterator[Iterable[Any]], telling: Telling) -> Iterator[Iterable[Any]]:
    """
    Yield what ``steps`` does; whatever ends them ends the map.

    Not a ``try`` around their loop: from Python 3.12 on some jumps back in a loop belong to no
    ``try``, and such jumps are where handlers run. Ctrl-C there would skip the ``finally``.
    """
    try:
        yield from steps
    except Late:
        raise late() from None
    finally:
        try:
            telling.leave()
        except BaseException:
            telling.leave()  # Ctrl-C has come before it had done anything
            raise


def raising(error: CallbackRaised) -> Iterator[Any]:
    """Return in place of results what raises that a callback has failed."""
    raise error
    yield


class Results(chain[Any]):
    """
    What ``map`` returns.

    Not a generator, which ends with whatever is raised out of it: when a callback has failed, the
    next call goes on where this one was. So does a chain of iterators when one of them raises; and
    it takes no Python code to step from one result to the next.
    """

    _steps: Any

    @classmethod
    def of(cls, run: Steps) -> Results:
        """Return the results of a map."""
        steps = run.steps()
        results: Any = cls.from_iterable(steps)
        results._steps = steps
        return results  # type: ignore[no-any-return]

    def close(self) -> None:
        """End the iteration."""
        self._steps.close()


class _NoLedger(Exception):
    """There was no descriptor for one."""

    def __init__(self, why: OSError) -> None:
        super().__init__(why)
        self.why = why


def late() -> Exception:
    """Return what is raised when the timeout is over."""
    # Here, as it brings logging along, whose fork hooks each job would pay for.
    import concurrent.futures

    return concurrent.futures.TimeoutError("map has not finished within its timeout")


def reclaim(shared: Shared) -> None:
    """Give back at once what has ended already; errors of callbacks are for the next observer."""
    if not shared.closed and not issuing():
        try:
            shared.reactor.reap()
        except (CallbackRaised, OSError):
            return
