# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Workers between two jobs, of one pool in one process.

Guarantees:

* A worker at rest holds no token. It holds a *seat*: a berth whose lock it shares with us, and into
  which the token for its next job is moved. Seats are counted for the whole pool, so its workers at
  rest are, whichever process they belong to; who finds no seat for a worker lets it end.
* A worker is in one place at a time: at rest here, in the hand of a thread that is about to give it
  a job (then the lease that the thread took leads to it), or at work.
* A token that comes back to a busy process stays with its worker until that process has looked
  whether it has another job: ``unload`` puts it into the pool, before the process waits and before
  it runs code of the user's. Not for longer than ``_TURN`` on end, or processes that wait for a
  token would never get one from a busier one.
* A worker at rest ends when its owner does, as its channel does; and by itself after a while. It
  then closes its ear before it looks for a job for the last time, so that a job that was sent has
  been heard, or sending it fails.

The caller holds the lock of the reactor.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Optional

from ._slots._lease import Lease

if TYPE_CHECKING:
    from ._flight import Flight
    from ._slots._pool import SlotPool

# How many seconds a process may hand a token from job to job, past others who wait for one.
_TURN = 0.05


class Crew:
    """
    The workers at rest.

    Args:
        slots: The pool.
        tasks: How many jobs a worker runs at most; None for any number.
    """

    def __init__(self, slots: SlotPool, tasks: Optional[int]) -> None:
        self.slots = slots
        self.tasks = tasks
        self.warm: bool = tasks != 1
        # The one that came last is warmest, and goes first; the others grow old and end.
        self._resting: list[Flight] = []
        # Those among them who still have the token of their last job.
        self.loaded: list[Flight] = []

    def __len__(self) -> int:
        return len(self._resting)

    def try_take(self) -> Optional[Lease]:
        """Take a free token for the next job, for a worker at rest if possible."""
        if not self.warm:
            return self.slots.try_take()
        if self.loaded:
            flight = self.loaded.pop()
            self._resting.remove(flight)
            assert flight.seat is not None  # noqa: S101  # what being at rest means
            self._hand_out(flight, flight.seat)
            return flight.seat
        empty = None
        for flight in reversed(self._resting):
            lease = flight.seat
            assert lease is not None  # noqa: S101  # what being at rest means
            if lease.section is empty:
                continue
            if lease.refill():
                lease.since = monotonic()
                self._resting.remove(flight)
                self._hand_out(flight, lease)
                return lease
            empty = lease.section
            if len(self.slots.sections) == 1:
                return None
        lease = self.slots.try_take(seat=True)
        if lease is not None:
            lease.since = monotonic()
        return lease

    def take_for(self, lease: Lease) -> None:
        """Choose a worker at rest for a token that the job itself has given away."""
        if self._resting and lease.fileno() >= 0:
            self._hand_out(self._resting.pop(), lease)

    def _hand_out(self, flight: Flight, lease: Lease) -> None:
        flight.held = True
        lease.worker = flight

    def rest(self, flight: Flight, lease: Optional[Lease]) -> bool:
        """
        Let a worker that is done wait for its next job; False if there is no seat for it.

        Args:
            flight: The worker.
            lease: Its own, with the token of its last job; None if it has lost that.
        """
        if lease is not None and lease.seated:
            if monotonic() - lease.since < _TURN:
                self.loaded.append(flight)
            else:
                lease.drain()
        else:
            if lease is not None:
                lease.release()
            lease = self.slots.reserve()
            if lease is None:
                return False
        flight.seat = lease
        self._resting.append(flight)
        return True

    def unload(self) -> None:
        """Put the tokens of workers at rest into the pool."""
        while self.loaded:
            seat = self.loaded.pop().seat
            if seat is not None:
                seat.drain()

    def leave(self, flight: Flight) -> bool:
        """Take out a worker that has ended by itself; False if it is not at rest."""
        if flight not in self._resting:
            return False
        self._resting.remove(flight)
        if flight in self.loaded:
            self.loaded.remove(flight)
        self.unseat(flight)
        return True

    def dissolve(self) -> list[Flight]:
        """Take out all workers at rest; they are the caller's to end."""
        gone, self._resting, self.loaded = self._resting, [], []
        for flight in gone:
            self.unseat(flight)
        return gone

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        self._resting, self.loaded = [], []

    def unseat(self, flight: Flight) -> None:
        """Give up the seat of a worker that is to end."""
        seat, flight.seat = flight.seat, None
        if seat is not None:
            seat.release()
