# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``Jobserver.map``: chunks, windows, order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from ._callbacks import issuing
from ._check import check_args, check_kwargs
from ._errors import Blocked, CallbackRaised
from ._future import Future
from ._worker._chunk import Chunk, run_chunk
from ._worker._task import Task

if TYPE_CHECKING:
    from ._shared import Shared

Call = tuple[tuple[Any, ...], dict[str, Any]]
Submit = Callable[
    [Task, int, Optional[Callable[[], Optional[float]]], Optional[float], Optional[Future[Any]]],
    Optional[Future[Any]],
]


class _Late(Exception):
    """The timeout is over; apart from the Blocked that fn itself may raise."""


class Plan(NamedTuple):
    """What is the same for every submission of one map."""

    fn: Callable[..., Any]
    env: dict[str, Optional[str]]
    preexec_fn: Optional[Callable[[], Any]]
    sleep_fn: Optional[Callable[[], Optional[float]]]
    deadline: Optional[float]

    def task(self, calls: tuple[Call, ...]) -> Task:
        """Return the job for a chunk."""
        return Task(run_chunk, (self.fn, calls), {}, self.env, self.preexec_fn)


def plan_map(
    submit: Submit,
    shared: Shared,
    plan: Plan,
    argses: Optional[Iterable[Iterable[Any]]],
    kwargses: Optional[Iterable[Mapping[str, Any]]],
    chunksize: int,
    buffersize: Optional[int],
) -> Iterator[Any]:
    """Check everything now; submit and yield as the result is iterated over."""
    _check_size("chunksize", chunksize)
    if buffersize is not None:
        _check_size("buffersize", buffersize)
    for name, given, element in (
        ("argses", argses, "iterables of positional arguments"),
        ("kwargses", kwargses, "mappings"),
    ):
        if isinstance(given, Mapping):
            raise TypeError(f"{name} must be an iterable of {element}, not a single mapping")
        if given is not None and not isinstance(given, Iterable):
            raise TypeError(f"{name} must be iterable, not {type(given).__name__}")
    _check_lengths(argses, kwargses)
    calls = _calls(argses, kwargses)
    if buffersize is None:
        calls = iter(list(calls))
    return _run(submit, shared, plan, calls, chunksize, buffersize)


def _check_size(name: str, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int, not {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be >= 1, not {size}")


def _check_lengths(argses: Any, kwargses: Any) -> None:
    # Known now for sized inputs, and else when the shorter one has run out.
    sized = hasattr(argses, "__len__") and hasattr(kwargses, "__len__")
    if sized and len(argses) != len(kwargses):
        raise ValueError(
            f"argses and kwargses must be equally long, not {len(argses)} and {len(kwargses)}"
        )


_MISSING: Any = object()


def _calls(
    argses: Optional[Iterable[Iterable[Any]]], kwargses: Optional[Iterable[Mapping[str, Any]]]
) -> Iterator[Call]:
    if argses is None and kwargses is None:
        return
    if argses is None or kwargses is None:
        for args in argses or ():
            yield check_args(args), {}
        for kwargs in kwargses or ():
            yield (), check_kwargs(kwargs)
        return
    for args, kwargs in itertools.zip_longest(argses, kwargses, fillvalue=_MISSING):
        if args is _MISSING or kwargs is _MISSING:
            shorter = "argses" if args is _MISSING else "kwargses"
            raise ValueError(f"argses and kwargses must be equally long: {shorter} ended first")
        yield check_args(args), check_kwargs(kwargs)


def _run(
    submit: Submit,
    shared: Shared,
    plan: Plan,
    calls: Iterator[Call],
    chunksize: int,
    buffersize: Optional[int],
) -> Iterator[Any]:
    outstanding: deque[Future[Chunk]] = deque()
    waiting: Optional[tuple[Call, ...]] = None  # read, and not submitted yet
    gate = plan.sleep_fn
    try:
        while True:
            room = buffersize is None or len(outstanding) < buffersize
            if waiting is None and room:
                waiting = tuple(itertools.islice(calls, chunksize)) or None
            head = outstanding[0] if outstanding else None
            if waiting is not None and room:
                # Until the head is done: its results are yielded first, then we try again.
                try:
                    future = submit(plan.task(waiting), 1, gate, plan.deadline, head)
                except Blocked:
                    raise _Late from None
                gate = _let_in  # asked already, if it is this chunk's turn once more
                if future is not None:
                    outstanding.append(future)
                    waiting, gate = None, plan.sleep_fn
                    if not _ready(head):
                        continue
            elif head is None:
                return
            yield from _chunk_of(shared, outstanding, plan.deadline)
    except _Late:
        # Here, as it brings logging along, whose fork hooks each job would pay for.
        import concurrent.futures

        raise concurrent.futures.TimeoutError("map has not finished within its timeout") from None
    finally:
        outstanding.clear()
        _reclaim(shared)


def _let_in() -> None:
    pass


def _ready(head: Optional[Future[Chunk]]) -> bool:
    return head is not None and head._outcome is not None


def _chunk_of(
    shared: Shared, outstanding: deque[Future[Chunk]], deadline: Optional[float]
) -> Iterator[Any]:
    head = outstanding[0]
    if not shared.admission.wait_for(head, deadline):
        raise _Late
    chunk = head.result()
    outstanding.popleft()
    yield from chunk.results()


def _reclaim(shared: Shared) -> None:
    """Give back at once what has ended already; errors of callbacks are for the next observer."""
    if not shared.closed and not issuing():
        try:
            shared.reactor.reap()
        except (CallbackRaised, OSError):
            return
