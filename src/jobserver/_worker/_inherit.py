# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Descriptors that came along with a task."""

from __future__ import annotations

_received: list[int] = []


def hold(fds: list[int]) -> None:
    """State what has been received for the task that is unpickled next."""
    global _received  # noqa: PLW0603
    _received = fds


class InheritedFd:
    """One of them; ``detach`` gives it away, as multiprocessing's own do."""

    def __init__(self, place: int) -> None:
        self._place = place

    def detach(self) -> int:
        """Return the descriptor, now the caller's."""
        return _received[self._place]
