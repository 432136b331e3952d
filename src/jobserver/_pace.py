# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How many calls the next batch of a map gets, by how long the batches before it took."""

from __future__ import annotations

from typing import Optional

# What a batch is to last: so long that the cost of handing it over does not show, and so short
# that nobody waits for it.
TARGET = 0.2
# Grown while it lasts less than this, shrunk when it lasts more than that.
SHORT = TARGET / 2
LONG = 2.0
# A batch that lasts longer than this gives back the calls that it has not begun.
PATIENCE = 2 * TARGET
# How many times as many calls as have been seen to be short enough.
_GROWTH = 4
# With so many calls that do nothing, handing them over costs less than making them.
MOST = 8192
# Of what is left, each slot gets its share in so many batches at least: the last ones are small.
_ROUNDS = 3


class Pace:
    """
    The size of the next batch: a pure rule, one for each map.

    * At least one call, and never more than ``MOST``.
    * It grows only on evidence: to ``_GROWTH`` times the calls of a batch that was ``SHORT``, and
      not beyond what would last ``TARGET`` at that batch's rate.
    * It shrinks to what would last ``TARGET`` when a batch was ``LONG``, or has given calls back.
    * Batches are the smaller the less work is left, so that the slots finish together.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 1

    def note(self, given: int, done: int, seconds: float) -> None:
        """
        Take note of a batch that has ended.

        Args:
            given: How many calls it had, without those that another batch has taken over.
            done: How many of them it has made; the others it has given back.
            seconds: How long they took.
        """
        if done < 1:
            return
        fits = MOST if seconds * MOST <= TARGET * done else max(1, int(TARGET * done / seconds))
        if done < given or seconds > LONG:
            self.size = min(self.size, fits)
        elif seconds < SHORT:
            self.size = max(self.size, min(fits, _GROWTH * done))

    def next(self, left: Optional[int], slots: int) -> int:
        """
        Return how many calls the next batch gets.

        Args:
            left: How many there are; None if nobody knows.
            slots: How many batches may run at once.
        """
        if left is None:
            return self.size
        return max(1, min(self.size, left // (_ROUNDS * slots)))
