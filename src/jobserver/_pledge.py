# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What becomes of one call in a backlog: a future of an executor, or a place in a map's results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional, Protocol

if TYPE_CHECKING:
    from ._future import Future
    from ._worker._initialize import InitializerFailed


class Pledge(Protocol):
    """Who is told how a call has ended; whoever takes it out of the backlog tells it."""

    job: Optional[Future[Any]]  # while running
    #: What the sleep_fn of the Jobserver has said about this call.
    admitted: bool
    asks_at: float
    number: int  # in the queue from which workers take calls; 0 outside of it (see ``_calls``)
    alone: bool  # it is no call for there

    def told(self) -> bool:
        """Become running; False if it was cancelled before."""
        ...

    def begin(self) -> None:
        """A worker has begun with the call."""
        ...

    def resolve(self, value: Any, error: Optional[BaseException] = None) -> None:
        """Take the result, or the exception."""
        ...

    def drop(self) -> None:
        """The call, which is no more pending, will not be made."""
        ...


class Terms(Protocol):
    """When a call's result is told, and in which words its failure."""

    #: Whether it is to come through, at once, what a signal handler has raised.
    interruptible: bool

    def put_off(self, pledge: Pledge, get: Callable[[], Any]) -> bool:
        """Leave it to ``pledge`` to get its result; False if that is to be done now."""
        ...

    def of_start(self, error: BaseException) -> BaseException:
        """Return what is raised where the call could not be started."""
        ...

    def of_end(self, error: BaseException, *, died: bool) -> BaseException:
        """Return what is raised where it has ended with ``error``."""
        ...

    def broken_by(self, failure: InitializerFailed) -> BaseException:
        """Return what is raised where an initializer is to blame."""
        ...


class Slip:
    """The place of one call in the results of a ``Jobserver.map``."""

    __slots__ = (
        "_error",
        "_get",
        "_value",
        "admitted",
        "alone",
        "asks_at",
        "done",
        "job",
        "number",
    )

    def __init__(self) -> None:
        self.job: Optional[Future[Any]] = None
        self.admitted = self.alone = self.done = False
        self.asks_at = 0.0
        self.number = 0
        self._value: Any = None
        self._error: Optional[BaseException] = None
        self._get: Optional[Callable[[], Any]] = None

    def told(self) -> bool:
        """Nobody can have cancelled it."""
        return True

    def begin(self) -> None:
        """Nobody asks whether it has begun."""

    def resolve(self, value: Any, error: Optional[BaseException] = None) -> None:
        """Take the result, or the exception."""
        self._value, self._error = value, error
        self.job = None
        self.done = True

    def put_off(self, get: Callable[[], Any]) -> None:
        """Take where the result is to be had."""
        self._get = get
        self.job = None
        self.done = True

    def take(self) -> Any:
        """Return the result, or raise the exception; once, as nothing here refers to it then."""
        get, self._get = self._get, None
        if get is not None:
            return get()
        value, self._value = self._value, None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else it and this frame are a cycle
        return value

    def drop(self) -> None:
        """Nobody waits for it."""


class _AsTheyAre:
    """The words of a Jobserver: all of this is of its own making."""

    interruptible = True

    def put_off(self, pledge: Pledge, get: Callable[[], Any]) -> bool:
        """To unpickle runs code of the user's: in its turn, like that which gets the result."""
        assert isinstance(pledge, Slip)  # noqa: S101  # a map has no others
        pledge.put_off(get)
        return True

    def of_start(self, error: BaseException) -> BaseException:
        return error.with_traceback(None)

    def of_end(self, error: BaseException, *, died: bool) -> BaseException:  # noqa: ARG002
        return error

    def broken_by(self, failure: InitializerFailed) -> BaseException:
        return failure  # a map has none


AS_THEY_ARE = _AsTheyAre()
