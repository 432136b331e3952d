# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Frames on a channel between a worker and whoever launched it.

One frame is a header, the lengths of its segments, and the segments: text (a traceback), a pickle,
and the out-of-band buffers of that pickle (protocol 5), which so are never copied into it. Numbers
are little-endian. Channels are anonymous and made by ourselves; nothing else is ever unpickled.

Large segments may be *lent* (see ``_large``). They are then the last ones of the frame, and the
receiver may fetch them from the sender's memory. It need not: the frame is the same in any case,
and can be read to its end. There are three ways to agree:

* On a channel that ends with the frame (``UNTIL_CLOSED``) the sender just sends. What is lent does
  not fit into the channel, so the sender is kept waiting; the receiver fetches it, reads a little
  more than was waiting in the channel by then, to see that the sender still lives, and closes.
* Where the receiver does not want to hear anything on the channel, the lent segments have one of
  their own, which came along (``ASIDE``), and on which the same happens.
* On a channel that goes on (``UNTIL_TAKEN``) the sender stops before the lent segments and is told
  what to do: ``MORE``, send one byte, which shows that the sender still lives, and lets the
  receiver's poll come back for the next part; ``STREAM``, send all that is left; ``TAKEN``, the
  frame is over. Meanwhile the receiver sends nothing else on this channel.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Callable, Optional, Union

from ._dump import LARGE, Buffer, dump, load

if TYPE_CHECKING:
    from ._large import Lender

__all__ = ["Buffer", "dump"]  # what goes into frames is had from here, too

RESULT = 1  # the pickle is what fn returned
RAISED = 2  # the pickle is the exception that fn raised, the text its traceback
DIED = 3  # the same for an exception that ends a process: SystemExit, KeyboardInterrupt, ...
TASK = 4  # the pickle is a job to run
KINDS = frozenset((RESULT, RAISED, DIED, TASK))

RETURNED = 1  # flag: the worker has returned its slot by itself
STAYS = 2  # flag: the worker waits for its next job
ASIDE_FLAG = 32  # flag: lent segments come on a channel of their own
ASKS_FLAG = 64  # flag: the sender of lent segments waits to be told how to go on
LENT_FLAG = 128  # flag: segments are lent

# How the receiver of lent segments says that it has them.
UNTIL_CLOSED = LENT_FLAG
ASIDE = LENT_FLAG | ASIDE_FLAG
UNTIL_TAKEN = LENT_FLAG | ASKS_FLAG
TAKEN, MORE, STREAM = b"+", b".", b"-"

MAGIC = b"JsF2"
HEADER = struct.Struct("<4sBBxxiI")  # magic, kind, flags, exit code, number of segments
# The same with the lengths of two segments: all there is to most frames.
_BRIEF = struct.Struct("<4sBBxxiIQQ")
# The same behind the number of descriptors that come along.
_SMALL_JOB = struct.Struct("<I4sBBxxiIQQ")
ENTRY_SIZE = 8  # for each segment its length, and in the highest byte what it is
WHAT = 56
LENGTH = (1 << WHAT) - 1
IS_LENT = 128
LENDER_SIZE = 32  # what the lender tells of itself, before the addresses
# What the unpickler is to get; smaller segments are always buffers of any kind.
TYPES = (memoryview, bytes, bytearray)
# A frame below this size is copied into one piece, so that one system call sends it.
_JOINED = 1 << 15
IOV_MAX = 1024
# In one call no more is written of what is lent. A process that is being killed may go on with the
# call that it is in, but does not make another one.
STEP = 1 << 16


_write = os.write
Write = Callable[[list[memoryview]], int]


class Corrupt(Exception):
    """The channel carried something that is no frame: a job has written to a foreign descriptor."""


class Frame:
    """One received frame."""

    __slots__ = ("exitcode", "flags", "kind", "segments")

    def __init__(self, kind: int, flags: int, exitcode: int, segments: list[Any]) -> None:
        self.kind: int = kind
        self.flags: int = flags
        self.exitcode: int = exitcode
        self.segments: list[Any] = segments

    @property
    def text(self) -> str:
        """The traceback that came along, or the empty string."""
        return str(self.segments[0], "utf-8", "replace")

    def load(self) -> Any:
        """Unpickle; may raise anything, as it runs the code of the pickled classes."""
        return load(self.segments[1], self.segments[2:])


class Pieces(list[Buffer]):
    """The pieces of a frame, of which the last ones may be lent."""

    lender: Optional[Lender] = None
    lent = 0  # how many
    asks = False
    # The same frame, with nothing lent.
    whole: Callable[[], Pieces]


def encode(
    kind: int,
    text: Union[str, bytes],
    payload: Sequence[Buffer],
    *,
    flags: int = 0,
    exitcode: int = 0,
    lend: int = 0,
) -> Pieces:
    """
    Return the pieces of a frame, ready for ``send``.

    Args:
        kind: ``RESULT``, ...
        text: The first segment.
        payload: The others, as ``dump`` returns them.
        flags: ``RETURNED`` and ``STAYS``, where they apply.
        exitcode: The exit status of a worker that ends with this frame.
        lend: ``UNTIL_CLOSED``, ``UNTIL_TAKEN`` or ``ASIDE`` if large segments may be lent.
    """
    pickled = payload[0]
    if not text and len(payload) == 1 and type(pickled) is bytes and len(pickled) < _JOINED:
        return Pieces((brief_frame(kind, pickled, flags, exitcode),))
    first = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    segments: list[Buffer] = [first, *payload]
    lengths = [len(segment) for segment in segments]  # all are buffers of bytes
    total = sum(lengths)
    if total >= LARGE:
        return _encode_large(kind, flags, exitcode, segments, lend)
    head = _head(kind, flags, exitcode, lengths)
    return Pieces([head + b"".join(segments)] if total < _JOINED else [head, *segments])


def brief_frame(kind: int, pickled: bytes, flags: int = 0, exitcode: int = 0) -> bytes:
    """Return the frame that is a small pickle and nothing else."""
    return _BRIEF.pack(MAGIC, kind, flags, exitcode, 2, 0, len(pickled)) + pickled


def _head(kind: int, flags: int, exitcode: int, entries: Sequence[int]) -> bytes:
    count = len(entries)
    head = HEADER.pack(MAGIC, kind, flags, exitcode, count)
    return head + struct.pack(f"<{count}Q", *entries)


def _encode_large(
    kind: int, flags: int, exitcode: int, segments: list[Buffer], lend: int
) -> Pieces:
    from . import _large

    # Text and pickle may be of any type.
    types = [memoryview, memoryview, *map(type, segments[2:])]
    large = [segment for segment in segments if len(segment) >= LARGE]
    lender = _large.lend(large) if lend else None
    entries = []
    for segment, what in zip(segments, types):
        mark = TYPES.index(what) | (IS_LENT if lender and len(segment) >= LARGE else 0)
        entries.append(len(segment) | mark << WHAT)
    if lender is None:
        return Pieces([_head(kind, flags, exitcode, entries), *segments])
    head = _head(kind, flags | lend, exitcode, entries) + lender.head()
    small = [segment for segment in segments if len(segment) < LARGE]
    pieces = Pieces([head, *small, *large])
    pieces.lender, pieces.lent, pieces.asks = lender, len(large), bool(lend & ASKS_FLAG)
    pieces.whole = lambda: _encode_large(kind, flags, exitcode, segments, 0)
    return pieces


def brief(data: bytes, start: int) -> Optional[Frame]:
    """Return the frame that all bytes from ``start`` on are, if it is one of two segments."""
    at = start + _BRIEF.size
    if len(data) < at:
        return None
    magic, kind, flags, exitcode, count, first, second = _BRIEF.unpack_from(data, start)
    end = at + first
    # A segment that is marked in any way is longer than all there can be.
    if count != 2 or end + second != len(data) or magic != MAGIC or kind not in KINDS:
        return None
    return Frame(kind, flags, exitcode, [data[at:end], data[end:]])


def send_frame(
    fd: int,
    kind: int,
    text: str,
    payload: Sequence[Buffer],
    flags: int,
    exitcode: int,
    lend: int,
) -> None:
    """Make a frame of these, see ``encode``, and send it, see ``send``; a small one at once."""
    pickled = payload[0]
    if text or len(payload) > 1 or type(pickled) is not bytes or len(pickled) >= _JOINED:
        send(fd, encode(kind, text, payload, flags=flags, exitcode=exitcode, lend=lend))
        return
    data = brief_frame(kind, pickled, flags, exitcode)
    sent = _write(fd, data)
    while sent < len(data):
        sent += _write(fd, data[sent:])


def small_job(data: bytes) -> Optional[bytes]:
    """Return the pickled task if the data is a job that is that and nothing else."""
    if len(data) < _SMALL_JOB.size:
        return None
    fds, magic, kind, _flags, _exitcode, count, first, second = _SMALL_JOB.unpack_from(data)
    pickled = data[_SMALL_JOB.size :]
    # No descriptors, no text.
    if fds or first or second != len(pickled) or count != 2 or magic != MAGIC or kind != TASK:
        return None
    return pickled


def send(fd: int, pieces: Pieces) -> None:
    """Send a frame on a blocking descriptor; one with lent segments until they are taken."""
    if len(pieces) == 1:
        data: Any = pieces[0]
        while data:
            data = data[os.write(fd, data) :]
        return

    def write(views: list[memoryview]) -> int:
        return os.writev(fd, views)

    lender = pieces.lender
    if lender is None:
        write_all(pieces, write)
        return
    try:
        write_all(pieces[: -pieces.lent], write)
        if pieces.asks:
            _send_as_asked(fd, _views(pieces[-pieces.lent :]), write)
        else:
            write_all(pieces[-pieces.lent :], lambda views: os.write(fd, views[0][:STEP]))
    except ConnectionError:
        if pieces.asks:
            raise
        # Closed: so all has been taken. Or else there is nobody to tell.
    finally:
        lender.end()


def _send_as_asked(fd: int, rest: deque[memoryview], write: Write) -> None:
    while True:
        try:
            word = os.read(fd, 1)
        except BlockingIOError:  # there is a limit to how long one call waits
            continue
        if word == STREAM:
            _write_views(rest, write)
        if word != MORE:
            return
        advance(rest, write([rest[0][:1]]))


def write_all(pieces: Sequence[Buffer], write: Write) -> None:
    """Write all bytes; ``write`` takes some of what it is given, and returns how many."""
    _write_views(_views(pieces), write)


def _views(pieces: Sequence[Buffer]) -> deque[memoryview]:
    return deque(memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes)


def _write_views(views: deque[memoryview], write: Write) -> None:
    while views:
        advance(views, write(list(islice(views, IOV_MAX))))


def advance(views: deque[memoryview], count: int) -> None:
    """Take away so many bytes."""
    while views and count >= views[0].nbytes:
        count -= views.popleft().nbytes
    if count:
        views[0] = views[0][count:]
