# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Several calls in one worker."""

from __future__ import annotations

from collections.abc import Iterator
from pickle import PickleBuffer
from typing import Any, Callable, Optional

from jobserver._outcome import Outcome
from jobserver._wire import Frame

from ._answer import Answer, raised


class Chunk:
    """The values of the calls up to the first that failed, and that failure."""

    def __init__(self, values: list[Any], failed: Optional[Answer]) -> None:
        self._values = values
        self._failed = failed

    def results(self) -> Iterator[Any]:
        """Yield the values, then raise what the failed call raised."""
        yield from self._values
        if self._failed is not None:
            kind, text, payload, exitcode = self._failed
            segments = [text.encode("utf-8", "backslashreplace"), *payload]
            Outcome(Frame(kind, 0, exitcode, segments), None).get()

    def __reduce__(self) -> tuple[Any, ...]:
        failed = self._failed
        if failed is not None:
            # What is bytes or a bytearray must stay so; other buffers may be of any type.
            pickled, *buffers = failed.payload
            views: list[Any] = [
                piece if isinstance(piece, (bytes, bytearray)) else PickleBuffer(piece)
                for piece in buffers
            ]
            failed = failed._replace(payload=[bytes(pickled), *views])
        return Chunk, (self._values, failed)


def run_chunk(
    fn: Callable[..., Any], calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
) -> Chunk:
    """Call fn for each; stop at the first failure, which is where the iteration will end."""
    values: list[Any] = []
    for args, kwargs in calls:
        try:
            values.append(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001
            return Chunk(values, raised(error))
    return Chunk(values, None)
