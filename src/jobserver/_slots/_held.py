# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
A slot that one thread holds for its own work, next to the slot that the whole process runs on.

Guarantees:

* What such a thread may lend is its own slot and nobody else's: to everything that waits or
  submits it looks as if the thread were a job on that slot (``current_slot``).
* A job's first thread to ask uses the job's own slot; meanwhile no other thread lends that.
"""

from __future__ import annotations

import os
import threading
from typing import Optional

from jobserver import _forking

from ._lease import Lease
from ._own import OwnSlot, own_slot
from ._pool import SlotPool


class ThreadSlot(OwnSlot):
    """
    A slot taken for one thread.

    Args:
        pool: Where the token was taken.
        lease: The token.
        bell: What the thread is to ring when it starves, -1 for nothing.
    """

    def __init__(self, pool: SlotPool, lease: Lease, bell: int) -> None:
        super().__init__(pool.key, bell=bell)
        self._first = self.lease = lease
        self.consumes = True
        self.gone = False
        _forking.track(self)

    def close_bell(self) -> None:
        """Let go of the bell that the children of this thread ring."""
        with _forking.books_lock():
            bell, self._inner_bell = self._inner_bell, -1
            if bell >= 0:
                os.close(bell)

    def after_fork_in_child(self, passed: frozenset[int]) -> None:
        """The slot is the parent's."""
        self.gone = True
        self.lease = None
        bell, self._inner_bell = self._inner_bell, -1
        if bell >= 0 and bell not in passed:
            os.close(bell)


class _Here(threading.local):
    def __init__(self) -> None:
        self.slots: list[ThreadSlot] = []


_here = _Here()


def current_slot(pool: SlotPool) -> OwnSlot:
    """Return what this thread runs on: a slot of ``pool`` that it holds, else the process's."""
    for slot in _here.slots:
        if slot.attach(pool) and not slot.gone:
            return slot
    return own_slot()


def held_here(pool: SlotPool) -> Optional[OwnSlot]:
    """Return the slot that this thread holds for its own work, if any."""
    slot = current_slot(pool)
    mine = isinstance(slot, ThreadSlot) or slot.user == threading.get_ident()
    return slot if mine and slot.attach(pool) else None


def hold(slot: OwnSlot) -> None:
    """State what this thread runs on from now on."""
    if isinstance(slot, ThreadSlot):
        _here.slots.append(slot)


def drop(slot: OwnSlot) -> None:
    """State that it does so no more."""
    if isinstance(slot, ThreadSlot) and slot in _here.slots:
        _here.slots.remove(slot)
