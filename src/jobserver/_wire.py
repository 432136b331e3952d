# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Frames on a channel between a worker and whoever launched it.

One frame is a header, the lengths of its segments, and the segments: text (a traceback), a pickle,
and the out-of-band buffers of that pickle (protocol 5), which so are never copied into it. Numbers
are little-endian. Channels are anonymous and made by ourselves; nothing else is ever unpickled.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
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

_MAGIC = b"JsF1"
_HEADER = struct.Struct("<4sBBxxiI")  # magic, kind, flags, exit code, number of segments
_LENGTH = struct.Struct("<Q")
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


def dump(value: Any) -> list[Buffer]:
    """Pickle ``value`` the way multiprocessing does: the pickle, then its out-of-band buffers."""
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

    ForkingPickler(stream, 5, True, in_band).dump(value)  # type: ignore[call-arg, unused-ignore]
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
    head = bytearray(_HEADER.pack(_MAGIC, kind, flags, exitcode, len(segments)))
    for segment in segments:
        head += _LENGTH.pack(memoryview(segment).nbytes)
    return [head, *segments]


def send(fd: int, pieces: Sequence[Buffer]) -> None:
    """Write all pieces to a blocking descriptor."""
    pending = [memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes]
    while pending:
        written = os.writev(fd, pending[:_IOV_MAX])
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
                if self._frame is not None and not self._targets:
                    return self._frame
        except BlockingIOError:
            pass
        except ConnectionResetError:
            raise EOFError from None
        return None

    def _read(self, fd: int) -> int:
        if self._frame is not None:
            count = os.readv(fd, self._targets[:_IOV_MAX])
            self._advance(count)
            return count
        data = os.read(fd, self._head_missing())
        self._head += data
        self._parse_head()
        return len(data)

    def _head_missing(self) -> int:
        # A stream may carry the next frame right behind this one, so a task reader must not read
        # past the head; the answer is the last thing on its channel, and may be read greedily.
        if len(self._head) < _HEADER.size:
            return _HEADER.size - len(self._head)
        count = _HEADER.unpack_from(self._head)[4]
        return int(_HEADER.size + count * _LENGTH.size - len(self._head))

    def _parse_head(self) -> None:
        if len(self._head) < _HEADER.size:
            return
        magic, kind, flags, exitcode, count = _HEADER.unpack_from(self._head)
        if magic != _MAGIC or kind not in _KINDS or not 2 <= count <= _MAX_SEGMENTS:
            raise Corrupt(f"not a frame: {bytes(self._head[:16])!r}")
        if len(self._head) < _HEADER.size + count * _LENGTH.size:
            return
        lengths = struct.unpack_from(f"<{count}Q", self._head, _HEADER.size)
        try:
            segments = [bytearray(length) for length in lengths]
        except (MemoryError, OverflowError) as error:
            raise Corrupt(f"no memory for a frame of {sum(lengths)} bytes") from error
        self._frame = Frame(kind, flags, exitcode, segments)
        self._targets = [memoryview(segment) for segment in segments if segment]

    def _advance(self, count: int) -> None:
        while self._targets and count >= self._targets[0].nbytes:
            count -= self._targets.pop(0).nbytes
        if count:
            self._targets[0] = self._targets[0][count:]
