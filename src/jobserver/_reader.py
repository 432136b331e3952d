# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Put frames together from what comes on a channel; see ``_wire``."""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any, Optional

from ._dump import LARGE
from ._fds import adopt
from ._slots._splice import waiting_bytes
from ._wire import (
    ASIDE_FLAG,
    ASKS_FLAG,
    ENTRY_SIZE,
    HEADER,
    IOV_MAX,
    IS_LENT,
    KINDS,
    LENDER_SIZE,
    LENGTH,
    LENT_FLAG,
    MAGIC,
    MORE,
    STEP,
    STREAM,
    TAKEN,
    TYPES,
    WHAT,
    Corrupt,
    Frame,
    advance,
)

if TYPE_CHECKING:
    from ._large import Loan

_MAX_SEGMENTS = 1 << 24
FIRST_READ = 1 << 16
# How much is read, or fetched, in one go before other channels get their turn.
_READ_QUANTUM = 1 << 24
_FETCH_QUANTUM = 1 << 25


class FrameReader:
    """
    Put one frame together from a descriptor, blocking or not, piece by piece.

    Args:
        fds: The descriptors that came along with the frame, if there were any. A frame may take
            one off their end.
    """

    # What only frames with lent segments need.
    _asks = False
    _due = 0  # so many bytes are to come by the channel first
    _aside = -1  # their own channel
    _loan: Optional[Loan] = None
    # Where what is lent goes if it comes by the channel.
    _lent: deque[memoryview]

    def __init__(self, fds: Optional[list[int]] = None) -> None:
        self.progress = 0  # bytes received so far
        self.fds = fds
        self._head = bytearray()
        self._frame: Optional[Frame] = None
        self._targets: deque[memoryview] = deque()

    def feed(self, fd: int) -> Optional[Frame]:
        """
        Read what is there.

        Returns:
            The frame once it is whole; None when there is no more to read for now.

        Raises:
            EOFError: The other side is gone and the frame is not whole.
            Corrupt: What came is no frame.
        """
        budget = _READ_QUANTUM
        try:
            while budget > 0:
                if self._loan is not None and not self._targets:
                    if not self._fetch(fd, self._loan):
                        return None
                else:
                    aside = self._aside >= 0 and self._frame is not None and self._loan is None
                    budget -= self._read(self._aside if aside else fd)
                whole = self._whole()
                if whole is not None:
                    return whole
        except BlockingIOError:
            pass
        except ConnectionResetError:
            raise EOFError from None
        return None

    def push(self, data: bytes) -> Optional[Frame]:
        """Take what has been read from the channel already; like ``feed``."""
        self.progress += len(data)
        self._head += data
        self._parse_head()
        return self._whole()

    def _whole(self) -> Optional[Frame]:
        if self._frame is None or self._targets or self._loan is not None:
            return None
        if self._aside >= 0:
            os.close(self._aside)
            self._aside = -1
        # Not kept: the reader may outlive what was read, which may be large.
        whole, self._frame = self._frame, None
        return whole

    def _read(self, fd: int) -> int:
        if self._frame is not None:
            count = os.readv(fd, list(islice(self._targets, IOV_MAX)))
            advance(self._targets, count)
        else:
            # Greedily: on a channel nothing follows a frame before the frame has been answered.
            data = os.read(fd, FIRST_READ)
            count = len(data)
            self._head += data
            self._parse_head()
        if not count:
            raise EOFError
        self.progress += count
        return count

    def _parse_head(self) -> None:
        head = self._head
        if len(head) < HEADER.size:
            return
        magic, kind, flags, exitcode, count = HEADER.unpack_from(head)
        if magic != MAGIC or kind not in KINDS or not 2 <= count <= _MAX_SEGMENTS:
            raise Corrupt(f"not a frame: {bytes(head[:16])!r}")
        start = HEADER.size + count * ENTRY_SIZE
        if len(head) < start:
            return
        entries = struct.unpack_from(f"<{count}Q", head, HEADER.size)
        lent: dict[int, None] = {}
        told = start
        if flags & LENT_FLAG:
            lent = dict.fromkeys(n for n, entry in enumerate(entries) if entry >> WHAT & IS_LENT)
            start += LENDER_SIZE + len(lent) * ENTRY_SIZE
            if len(head) < start:
                return
        segments: list[Any] = [None] * count
        whole: list[memoryview] = []
        places: Iterable[int] = range(count)
        if lent:
            self._lent = deque()
            places = (*(n for n in places if n not in lent), *lent)
        try:
            for place in places:
                length, mark = entries[place] & LENGTH, entries[place] >> WHAT
                end = start + length
                if end <= len(head) and not mark:
                    segments[place] = head[start:end]
                else:
                    segments[place], view = _target(place, length, mark)
                    part = head[start:end]
                    # The rest is read to where it belongs.
                    view[: len(part)] = part
                    if place in lent:
                        whole.append(view)
                        self._lent.append(view[len(part) :])
                    elif len(part) < length:
                        self._targets.append(view[len(part) :])
                start = min(end, len(head))
        except (MemoryError, OverflowError, ValueError, OSError) as error:
            total = sum(entry & LENGTH for entry in entries)
            raise Corrupt(f"no memory for a frame of {total} bytes") from error
        if start < len(head):
            raise Corrupt("something follows the frame")
        if lent:
            from ._large import Loan

            self._asks = bool(flags & ASKS_FLAG)
            if flags & ASIDE_FLAG:
                if not self.fds:
                    raise Corrupt("a descriptor is missing")
                self._aside = self.fds.pop()
            self._loan = Loan(head[told:], whole)
        self._head = bytearray()
        self._frame = Frame(kind, flags & ~(LENT_FLAG | ASKS_FLAG | ASIDE_FLAG), exitcode, segments)

    def _fetch(self, fd: int, loan: Loan) -> bool:
        """Fetch what is lent; False if there is more to be done later."""
        if self._due:
            # These go where they belong like any other.
            count = os.readv(fd, [self._lent[0][: self._due]])
            if not count:
                raise EOFError
            advance(self._lent, count)
            self.progress += count
            self._due = self._due - count if self._lent else 0
            if self._due:
                return True
        if loan.complete:
            self._say(fd, TAKEN)
            self._loan = None
            self._lent.clear()
            return True
        left = _FETCH_QUANTUM
        while left > 0 and not loan.complete:
            count = loan.fetch(left)
            if not count:
                # It cannot be had in this way, or not any more.
                self._say(fd, STREAM)
                self._loan, self._targets = None, self._lent
                return True
            left -= count
            self.progress += count
        # What comes now shows that the sender was alive until here: one that was killed before has
        # died, whatever could still be had from it.
        if self._asks:
            self._say(fd, MORE)
            self._due = 1
        elif loan.complete and self._aside < 0:
            self._due = waiting_bytes(fd) + STEP + 1
        return loan.complete and not self._asks

    def _say(self, fd: int, word: bytes) -> None:
        if not self._asks:
            return
        sock = adopt(fd)
        try:
            sock.send(word, socket.MSG_NOSIGNAL)
        except OSError:
            pass  # the sender is gone, which the channel tells
        finally:
            sock.detach()


def _target(place: int, length: int, mark: int) -> tuple[Any, memoryview]:
    if length < LARGE and not mark:
        array = bytearray(length)
        return array, memoryview(array)
    from ._large import allocate

    if mark & ~IS_LENT >= len(TYPES):
        raise Corrupt(f"not a frame: a segment of kind {mark}")
    return allocate(TYPES[mark & ~IS_LENT] if place > 1 else memoryview, length)
