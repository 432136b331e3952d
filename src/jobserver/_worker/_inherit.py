# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Descriptors that came along with a task."""

from __future__ import annotations

import os

_received: list[int] = []
_wanted: set[int] = set()  # of the places in that list, those that were asked for


def hold(fds: list[int]) -> None:
    """State what has been received for the task that is unpickled next; close what nobody took."""
    global _received  # noqa: PLW0603
    for place, fd in enumerate(_received):
        if place not in _wanted:  # unpickling failed before it came to that
            os.close(fd)
    _wanted.clear()
    _received = fds


class InheritedFd:
    """One of them; ``detach`` gives it away, as multiprocessing's own do."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        """Return the descriptor, now the caller's."""
        _wanted.add(self._place)
        return _received[self._place]
