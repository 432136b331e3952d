# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What a worker gets to sit on: the descriptors of its slot and of the bell."""

from __future__ import annotations

from typing import NamedTuple, Optional

from jobserver._slots._lease import Lease
from jobserver._slots._own import OwnSlot
from jobserver._slots._pool import SlotPool


class Seat(NamedTuple):
    """A job with a slot has a lease; one below another job has a bell to ring."""

    key: tuple[int, int]
    lease_fd: int
    place: Optional[tuple[int, int]]
    bell: int

    def fds(self) -> frozenset[int]:
        """Return the descriptors that the worker keeps."""
        return frozenset(fd for fd in (self.lease_fd, self.bell) if fd >= 0)


def seat_for(pool: SlotPool, lease: Optional[Lease], own: OwnSlot) -> Seat:
    """Return the seat for a child of this process."""
    bell = own.bell_for_child() if own.attach(pool) else -1
    if lease is not None:
        return Seat(pool.key, lease.fileno(), (pool.section_of(lease), lease.berth), bell)
    return Seat(pool.key, -1, None, bell)
