# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Frames on a channel between a worker and whoever launched it.

One frame is a header, the lengths of its segments, and the segments: text (a traceback), a pickle,
and the out-of-band buffers of that pickle (protocol 5), which so are never copied into it. Numbers
are little-endian. Channels are anonymous and made by ourselves; nothing else is ever unpickled.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
from collections import ChainMap
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, Optional, Union

Buffer = Union[bytes, bytearray, memoryview]

RESULT = 1  # the pickle is what fn returned
RAISED = 2  # the pickle is the exception that fn raised, the text its traceback
DIED = 3  # the same for an exception that ends a process: SystemExit, KeyboardInterrupt, ...
TASK = 4  # the pickle is a job to run
_KINDS = frozenset((RESULT, RAISED, DIED, TASK))

RETURNED = 1  # flag: the worker has returned its slot by itself
STAYS = 2  # flag: the worker waits for its next job

_MAGIC = b"JsF1"
_HEADER = struct.Struct("<4sBBxxiI")  # magic, kind, flags, exit code, number of segments
_LENGTH_SIZE = 8
# A frame below this size is copied into one piece, so that one system call sends it.
_JOINED = 1 << 15
# A buffer below this size is cheaper inside the pickle than as a segment of its own.
_OUT_OF_BAND = 1 << 14
_MAX_SEGMENTS = 1 << 24
_FIRST_READ = 1 << 16
# How much is read in one go before other channels get their turn.
_READ_QUANTUM = 1 << 24
_IOV_MAX = 1024


class Corrupt(Exception):
    """The channel carried something that is no frame: a job has written to a foreign descriptor."""


class Frame:
    """One received frame."""

    __slots__ = ("exitcode", "flags", "kind", "segments")

    def __init__(self, kind: int, flags: int, exitcode: int, segments: list[bytearray]) -> None:
        self.kind = kind
        self.flags = flags
        self.exitcode = exitcode
        self.segments = segments

    @property
    def text(self) -> str:
        """The traceback that came along, or the empty string."""
        return self.segments[0].decode("utf-8", "replace")

    def load(self) -> Any:
        """Unpickle; may raise anything, as it runs the code of the pickled classes."""
        return pickle.loads(self.segments[1], buffers=self.segments[2:])  # noqa: S301


# What needs none of multiprocessing's reductions, and has no buffers.
_PLAIN = frozenset((type(None), bool, int, float, str))


_forking_pickler: Any = ForkingPickler
_reducers: Any = ChainMap(_forking_pickler._extra_reducers, copyreg.dispatch_table)


class _Pickler(pickle.Pickler):
    """ForkingPickler without its constructor, which costs more than most pickles."""

    dispatch_table = _reducers


def dump(value: Any) -> list[Buffer]:
    """Pickle ``value`` the way multiprocessing does: the pickle, then its out-of-band buffers."""
    if type(value) in _PLAIN:
        return [pickle.dumps(value, 5)]
    stream = io.BytesIO()
    buffers: list[Buffer] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < _OUT_OF_BAND:
            return True
        buffers.append(raw)
        return False

    _Pickler(stream, 5, buffer_callback=in_band).dump(value)
    return [stream.getbuffer(), *buffers]


def encode(
    kind: int,
    text: Union[str, bytes],
    payload: Sequence[Buffer],
    *,
    flags: int = 0,
    exitcode: int = 0,
) -> list[Buffer]:
    """Return the pieces of a frame, ready for ``send``."""
    first = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    segments: list[Buffer] = [first, *payload]
    count = len(segments)
    lengths = [len(segment) for segment in segments]  # all are buffers of bytes
    head = _HEADER.pack(_MAGIC, kind, flags, exitcode, count) + struct.pack(f"<{count}Q", *lengths)
    if sum(lengths) < _JOINED:
        return [head + b"".join(segments)]
    return [head, *segments]


def send(fd: int, pieces: Sequence[Buffer]) -> None:
    """Write all pieces to a blocking descriptor."""
    pending = [memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes]
    while pending:
        single = len(pending) == 1
        written = os.write(fd, pending[0]) if single else os.writev(fd, pending[:_IOV_MAX])
        while pending and written >= pending[0].nbytes:
            written -= pending.pop(0).nbytes
        if written:
            pending[0] = pending[0][written:]


class FrameReader:
    """Put one frame together from a descriptor, blocking or not, piece by piece."""

    def __init__(self) -> None:
        self.progress = 0  # bytes read so far
        self._head = bytearray()
        self._frame: Optional[Frame] = None
        self._targets: list[memoryview] = []

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
                count = self._read(fd)
                if not count:
                    raise EOFError
                budget -= count
                self.progress += count
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
        if self._frame is None or self._targets:
            return None
        # Not kept: the reader may outlive what was read, which may be large.
        whole, self._frame = self._frame, None
        return whole

    def _read(self, fd: int) -> int:
        if self._frame is not None:
            count = os.readv(fd, self._targets[:_IOV_MAX])
            self._advance(count)
            return count
        # Greedily: on a channel nothing follows a frame before the frame has been answered.
        data = os.read(fd, _FIRST_READ)
        self._head += data
        self._parse_head()
        return len(data)

    def _parse_head(self) -> None:
        if len(self._head) < _HEADER.size:
            return
        magic, kind, flags, exitcode, count = _HEADER.unpack_from(self._head)
        if magic != _MAGIC or kind not in _KINDS or not 2 <= count <= _MAX_SEGMENTS:
            raise Corrupt(f"not a frame: {bytes(self._head[:16])!r}")
        if len(self._head) < _HEADER.size + count * _LENGTH_SIZE:
            return
        lengths = struct.unpack_from(f"<{count}Q", self._head, _HEADER.size)
        start = _HEADER.size + count * _LENGTH_SIZE
        segments: list[bytearray] = []
        try:
            for length in lengths:
                end = start + length
                segment = self._head[start:end]
                if len(segment) < length:
                    # The rest is read to where it belongs.
                    whole = bytearray(length)
                    whole[: len(segment)] = segment
                    self._targets.append(memoryview(whole)[len(segment) :])
                    segment = whole
                segments.append(segment)
                start = min(end, len(self._head))
        except (MemoryError, OverflowError) as error:
            raise Corrupt(f"no memory for a frame of {sum(lengths)} bytes") from error
        if start < len(self._head):
            raise Corrupt("something follows the frame")
        self._head = bytearray()
        self._frame = Frame(kind, flags, exitcode, segments)

    def _advance(self, count: int) -> None:
        while self._targets and count >= self._targets[0].nbytes:
            count -= self._targets.pop(0).nbytes
        if count:
            self._targets[0] = self._targets[0][count:]
