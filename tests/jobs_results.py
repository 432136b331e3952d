# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Values and exceptions that misbehave on their way, and jobs that answer with them."""

from __future__ import annotations

import builtins
import dataclasses
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Callable

from jobs import divide_deeply

if TYPE_CHECKING:
    from jobserver import Jobserver

# Arguments that misbehave on their way


class RaisesWhenPickled:
    """Cannot be pickled, with an exception of its own."""

    def __reduce__(self) -> Any:
        raise ZeroDivisionError("pickled too early")


def _refuse_to_load() -> None:
    raise ZeroDivisionError("unpickled too late")


class RaisesWhenUnpickled:
    """Pickles, but cannot be unpickled."""

    def __reduce__(self) -> Any:
        return _refuse_to_load, ()


class ExitsWhenPickled:
    """Ends the process that pickles it."""

    def __reduce__(self) -> Any:
        os._exit(17)


class ExitsWhenUnpickled:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (18,)


# Results and exceptions on their way back


def block(size: int) -> bytes:
    """Bytes that show when one is missing or moved."""
    pattern = b"0123456789abcdefghijklmnopqrstuvwxyz-"
    return (pattern * (size // len(pattern) + 1))[:size]


def deep_list(depth: int) -> list[Any]:
    """Lists inside lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class SoftExitWhenUnpickled:
    """Asks the process that unpickles it to end."""

    def __reduce__(self) -> Any:
        return sys.exit, (19,)


class Unspeakable(Exception):
    """Has no repr, and no text."""

    def __repr__(self) -> str:
        raise LookupError("there is nothing to say")

    __str__ = __repr__


def unspeakable() -> None:
    """Raise one."""
    raise Unspeakable


class UnspeakableWhenPickled:
    """Says nothing of why it cannot be pickled."""

    def __reduce__(self) -> Any:
        raise Unspeakable


class UnspeakableWhenUnpickled:
    """Says nothing of why it cannot be unpickled."""

    def __reduce__(self) -> Any:
        return unspeakable, ()


_KINDS: dict[str, Callable[[int], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "list": lambda size: list(range(size)),
    "lambda": lambda size: lambda: size,
    "lock": lambda size: threading.Lock(),
    "generator": lambda size: (n for n in range(size)),
    "too deep": lambda size: deep_list(100_000),
    "RaisesWhenPickled": lambda size: RaisesWhenPickled(),
    "RaisesWhenUnpickled": lambda size: [RaisesWhenUnpickled()],
    "ExitsWhenPickled": lambda size: ExitsWhenPickled(),
    "ExitsWhenUnpickled": lambda size: ExitsWhenUnpickled(),
    "SoftExitWhenUnpickled": lambda size: SoftExitWhenUnpickled(),
    "UnspeakableWhenPickled": lambda size: UnspeakableWhenPickled(),
    "UnspeakableWhenUnpickled": lambda size: UnspeakableWhenUnpickled(),
}


def give(kind: str, size: int) -> Any:
    """A result of the named kind, made in the worker."""
    return _KINDS[kind](size)


def raise_result(kind: str) -> None:
    """Raise an exception that carries the named kind."""
    raise ValueError(_KINDS[kind](0))


class NeedsTwo(Exception):
    """Pickles by default into a call with one argument, but needs two."""

    def __init__(self, first: str, second: int) -> None:
        super().__init__(first)
        self.first = first
        self.second = second


class TravelsWell(NeedsTwo):
    """The same, done right."""

    def __reduce__(self) -> Any:
        return TravelsWell, (self.first, self.second)


def raise_needs_two(well: bool = False) -> None:
    """Raise an exception with an __init__ of its own."""
    raise (TravelsWell if well else NeedsTwo)("the message", 2)


def raise_with_unpicklable() -> None:
    """Raise an exception that carries a lock."""
    raise ValueError("the message", threading.Lock())


def raise_local() -> None:
    """Raise an exception of a class that nobody else can find."""

    class LocalError(Exception):
        pass

    raise LocalError("the message")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    """Refuses every assignment to an attribute."""

    first: str

    def __reduce__(self) -> Any:
        return Frozen, (self.first,)


def raise_frozen() -> None:
    """Raise an exception that refuses to be changed."""
    raise Frozen("the message")


class BecomesText(Exception):
    """Unpickles to what is no exception."""

    def __reduce__(self) -> Any:
        return str, (self.args[0],)


def raise_becomes_text() -> None:
    """Raise an exception that is none any more when it arrives."""
    raise BecomesText("the message")


def raise_with_group() -> None:
    """Raise an exception group where there is such a thing."""
    if sys.version_info < (3, 11):
        raise ValueError("several") from ValueError("first of several")
    # By its name in a dictionary, since checkers know it from 3.11 on only.
    kind = vars(builtins)["ExceptionGroup"]
    raise kind("several", [ValueError("first of several")])


def nested_failure(js: Jobserver) -> Any:
    """Pass on what a nested job raises."""
    return js.submit(divide_deeply, args=(1,)).result()
