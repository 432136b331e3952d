# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The public Future."""

from __future__ import annotations

import signal as _signal
from collections import deque
from typing import TYPE_CHECKING, Any, Callable, Generic, NoReturn, Optional, TypeVar

from . import _forking
from ._callbacks import issue_now
from ._check import check_callable, deadline_of
from ._errors import Blocked
from ._signals import deferred

if TYPE_CHECKING:
    from ._admission import Admission
    from ._outcome import Outcome

    # Each with its number and its arguments.
    _Callbacks = deque[tuple[int, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]

T = TypeVar("T")


class Future(Generic[T]):
    """
    The result of one submission, to be had later.

    Made by ``Jobserver.submit``. Any thread may use a Future at any time. Dropping the last
    reference to a running one loses nothing: its slot comes back when the job ends.
    """

    __slots__ = (
        "__weakref__",
        "_admission",
        "_callbacks",
        "_foreign",
        "_issuing",
        "_lends",
        "_outcome",
        "_reactor",
        "_seqno",
        "_sink",
        "_vain",
    )

    def __init__(
        self, admission: Admission, lends: bool, sink: Optional[deque[Any]] = None
    ) -> None:
        self._admission = admission
        self._reactor = admission.reactor
        self._lends = lends
        self._outcome: Optional[Outcome] = None
        self._callbacks: Optional[_Callbacks] = None  # until there is one
        self._seqno = 0
        self._issuing = False
        self._sink = sink  # an executor's, told when this is done
        self._vain = False  # none of the user's calls is in it
        self._foreign = False  # in flight in the process that this one was forked from

    def done(self, timeout: Optional[float] = 0) -> bool:
        """
        Say whether ``result(timeout=0)`` will not block.

        Args:
            timeout: How many seconds to wait for it; None for as long as it takes.

        Raises:
            CallbackRaised: A callback failed; call again.
        """
        return self.wait(timeout)

    def wait(self, timeout: Optional[float] = None, *, signal: Optional[int] = None) -> bool:
        """
        Wait for the job to end.

        Args:
            timeout: How many seconds to wait at most; None for as long as it takes.
            signal: Sent to the running job first, at once; no error if it has just ended.

        Returns:
            Whether ``result(timeout=0)`` will not block.

        Raises:
            CallbackRaised: A callback failed; call again.
            ValueError: There is no such signal.
        """
        deadline = deadline_of(timeout)
        if signal is not None:
            self._send(signal)
        self._refuse_foreign()
        return self._admission.wait_for(self, deadline)

    def result(self, timeout: Optional[float] = None) -> T:
        """
        Return what fn returned, or raise what it raised, with the worker's traceback as cause.

        Args:
            timeout: How many seconds to wait at most; None for as long as it takes.

        Raises:
            Blocked: Not ready in time.
            SubmissionDied: The worker ended without a result.
            RuntimeError: The result or exception could not be pickled, or unpickled here.
            CallbackRaised: A callback failed; call again.
        """
        deadline = deadline_of(timeout)
        self._refuse_foreign()
        if not self._admission.wait_for(self, deadline):
            raise Blocked(f"no result within {timeout} seconds")
        assert self._outcome is not None  # noqa: S101  # that is what wait_for has said
        value: T = self._outcome.get()
        return value

    def when_done(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
        """
        Have ``fn(*args, **kwargs)`` called once the job is seen to have ended.

        The call happens on the thread that observes it, inside done, wait, result, submit or
        reclaim_resources, in order of registration; at once when the Future is done already. The
        Future is not passed unless it is among the arguments.

        Returns:
            The number of this registration, counted from 0.

        Raises:
            CallbackRaised: The Future was done already, and fn has failed.
        """
        check_callable("fn", fn)
        _forking.settle()
        with deferred(), self._reactor.lock:
            seqno = self._seqno
            self._seqno += 1
            if self._callbacks is None:
                self._callbacks = deque()
            self._callbacks.append((seqno, fn, args, kwargs))
            done = self._outcome is not None
        if done:
            issue_now(self)
        return seqno

    def _send(self, number: int) -> None:
        _forking.settle()
        # Checked first, so that a bad number is told also when the job has ended.
        number = _signal.Signals(number) if number in _NAMED else _check_realtime(number)
        with deferred(), self._reactor.lock:
            flight = self._reactor.running.get(self)
            if flight is not None:
                flight.send_signal(number)

    def _died(self) -> bool:
        """Whether the worker itself has died, rather than raised a SubmissionDied that it got."""
        return self._outcome is not None and self._outcome.died

    def _refuse_foreign(self) -> None:
        _forking.settle()
        if self._foreign and self._outcome is None:
            raise RuntimeError(
                "this Future was in flight when the process forked:"
                " only the process that submitted the job can wait for it"
            )

    def __repr__(self) -> str:
        _forking.settle()
        with deferred(), self._reactor.lock:
            flight = self._reactor.running.get(self)
            state = "running" if self._outcome is None else "done"
            pid = None if flight is None else flight.pid
            return f"Future({state}, callbacks={len(self._callbacks or ())}, pid={pid})"

    def __copy__(self) -> NoReturn:
        raise TypeError("a Future cannot be copied")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a Future cannot be copied")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Future cannot be pickled: it belongs to the process that submitted")


_NAMED = frozenset(int(number) for number in _signal.Signals)


def _check_realtime(number: int) -> int:
    if isinstance(number, int) and 0 < number < _signal.NSIG:
        return number
    raise ValueError(f"there is no signal {number!r}")
