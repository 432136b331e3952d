# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What a zygote and its clients say to each other (a kind, the number of the request, a value), and
what a worker is told along with its first job.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

if TYPE_CHECKING:
    from ._stay import Stays

MESSAGE = struct.Struct("<BxxxQi")

PING = 1  # -> READY, or THREADED when importing main has left threads running
FORK = 2  # (parent's pid) with the worker's channel -> LAUNCHED (pid) with pidfd, or FAILED (errno)
QUERY = 3  # -> EXITED, once the worker has been reaped
READY = 4
THREADED = 5
LAUNCHED = 6
FAILED = 7
EXITED = 8  # (exit status); unasked for any but 0

# The one descriptor that may go along.
RIGHTS = (int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS))
INT = struct.Struct("i")
SPACE = socket.CMSG_SPACE(INT.size)

# Device and inode of the pool, section and berth of the lease, the submitter's process id, flags.
_HEAD = struct.Struct("<qQqqiB")
_PLACE, _LEASE, _BELL, _MORE = 1, 2, 4, 8


class Head(NamedTuple):
    """
    What a worker is told along with its first job.

    Args:
        key: Which pool its slot belongs to.
        place: The section and the berth of the lease; None if it has none.
        has_lease: Whether the descriptor of a lease comes along; a plain token has none.
        has_bell: Whether the descriptor of a bell comes along, after that of the lease.
        parent_pid: The process id of who has submitted it.
        told: What has changed, or all there is to know, of what surrounds it.
        stays: How long it may stay; None for one job.
    """

    key: tuple[int, int]
    place: Optional[tuple[int, int]]
    has_lease: bool
    has_bell: bool
    parent_pid: int
    told: dict[str, Any]
    stays: Optional[Stays]


def pack_head(head: Head) -> bytes:
    """Return it as bytes."""
    key, place, has_lease, has_bell, parent_pid, told, stays = head
    # Mostly there is nothing that needs a pickle.
    more = pickle.dumps((told, stays)) if told or stays is not None else b""
    flags = has_lease * _LEASE | has_bell * _BELL
    if place is not None:
        flags |= _PLACE
    if more:
        flags |= _MORE
    return _HEAD.pack(*key, *(place or (0, 0)), parent_pid, flags) + more


def unpack_head(data: bytes) -> Head:
    """Return what ``pack_head`` was given."""
    device, inode, section, berth, parent_pid, flags = _HEAD.unpack_from(data)
    told, stays = pickle.loads(data[_HEAD.size :]) if flags & _MORE else ({}, None)  # noqa: S301
    place = (section, berth) if flags & _PLACE else None
    lease, bell = flags & _LEASE != 0, flags & _BELL != 0
    return Head((device, inode), place, lease, bell, parent_pid, told, stays)
