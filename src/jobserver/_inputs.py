# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What a map is to call its function with: read, checked, and counted if that is possible."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

from ._batch import Args, Kwargs
from ._check import check_args, check_kwargs


class Inputs:
    """
    Positional and keyword arguments, call by call.

    Args:
        argses: The positional arguments of each call, each an iterable; None for none.
        kwargses: The keyword arguments of each call, each a mapping; None for none.
        lazy: Whether to read only what is asked for.

    Raises:
        TypeError: What is there is malformed.
        ValueError: There are more of one than of the other.
    """

    def __init__(
        self,
        argses: Optional[Iterable[Iterable[Any]]],
        kwargses: Optional[Iterable[Mapping[str, Any]]],
        *,
        lazy: bool,
    ) -> None:
        _check_kinds(argses, kwargses)
        _check_lengths(argses, kwargses)
        self._both = argses is not None and kwargses is not None
        self._keyed = kwargses is not None
        self._error: Optional[Exception] = None
        self.left: Optional[int] = None
        #: Whether reading runs no code of the user's, which could wait for calls that were read
        #: before to be made.
        self.at_hand = not lazy or all(
            given is None or type(given) in (list, tuple) for given in (argses, kwargses)
        )
        if lazy:
            self._calls = _read(argses, kwargses)
        else:
            collected = _collect(argses, kwargses)
            self.left, self._calls = len(collected), iter(collected)

    def take(self, count: int) -> Optional[tuple[list[Args], Optional[list[Kwargs]]]]:
        """
        Return the arguments of the next calls, at most ``count``; None when there are no more.

        What reading them raises is raised, or, if some had been read before, the next time.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        found: list[Any] = []
        try:
            found.extend(itertools.islice(self._calls, count))
        except Exception as error:
            if not found:
                raise
            self._error = error
        if self.left is not None:
            self.left -= len(found)
        if not found:
            return None
        if self._both:
            return [args for args, _ in found], [kwargs for _, kwargs in found]
        return ([()] * len(found), found) if self._keyed else (found, None)


def _collect(
    argses: Optional[Iterable[Iterable[Any]]], kwargses: Optional[Iterable[Mapping[str, Any]]]
) -> list[Any]:
    if kwargses is None and isinstance(argses, (list, tuple)):
        argses = list(argses)
        if not [args for args in argses if type(args) is not tuple]:
            return argses  # there is nothing to check
    return list(_read(argses, kwargses))


def _read(
    argses: Optional[Iterable[Iterable[Any]]], kwargses: Optional[Iterable[Mapping[str, Any]]]
) -> Iterator[Any]:
    if kwargses is None:
        # Most arguments are tuples, for which there is nothing to check.
        return (
            args if type(args) is tuple else check_args(args)
            for args in (() if argses is None else argses)
        )
    if argses is None:
        return (check_kwargs(kwargs) for kwargs in kwargses)
    return _pairs(argses, kwargses)


_MISSING: Any = object()


def _pairs(
    argses: Iterable[Iterable[Any]], kwargses: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[Args, Kwargs]]:
    for args, kwargs in itertools.zip_longest(argses, kwargses, fillvalue=_MISSING):
        if args is _MISSING or kwargs is _MISSING:
            shorter = "argses" if args is _MISSING else "kwargses"
            raise ValueError(f"argses and kwargses must be equally long: {shorter} ended first")
        yield check_args(args), check_kwargs(kwargs)


def _check_kinds(argses: Any, kwargses: Any) -> None:
    for name, given, element in (
        ("argses", argses, "iterables of positional arguments"),
        ("kwargses", kwargses, "mappings"),
    ):
        if isinstance(given, Mapping):
            raise TypeError(f"{name} must be an iterable of {element}, not a single mapping")
        if given is not None and not isinstance(given, Iterable):
            raise TypeError(f"{name} must be iterable, not {type(given).__name__}")


def _check_lengths(argses: Any, kwargses: Any) -> None:
    # Known now for sized inputs, and else when the shorter one has run out.
    sized = hasattr(argses, "__len__") and hasattr(kwargses, "__len__")
    if sized and len(argses) != len(kwargses):
        raise ValueError(
            f"argses and kwargses must be equally long, not {len(argses)} and {len(kwargses)}"
        )
