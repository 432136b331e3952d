# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Pickle values, with what is large in them beside the pickle rather than inside.

Buffers that their owners offer (protocol 5: NumPy, Arrow, ...) and large ``bytes`` and
``bytearray`` objects are handed on as they are, and never copied. For the latter two the pickler
has no such offer. But it hands a large one to its file as the object itself, right after the
opcode and the length that announce it. ``NEXT_BUFFER`` takes their place, which makes the unpickler
take the object from ``buffers``.
"""

from __future__ import annotations

import copyreg
import pickle
import struct
from collections import ChainMap
from multiprocessing.reduction import ForkingPickler
from typing import Any, Callable, Union

Buffer = Union[bytes, bytearray, memoryview]

# A buffer below this size is cheaper inside the pickle than as a segment of its own.
_OUT_OF_BAND = 1 << 14
# So are bytes and bytearrays below this one. What the pickler itself collects before it writes is
# smaller, and so cannot be taken for one of them.
LARGE = 1 << 19

# What needs none of multiprocessing's reductions, and has no buffers.
_PLAIN = frozenset((bool, int, float, str))
_NONE = pickle.dumps(None, 5)

# Opcodes of the pickle protocol.
_PROTO, _FRAME, _NEXT_BUFFER = b"\x80", b"\x95", b"\x97"
_BINBYTES, _BINBYTES8, _BYTEARRAY8 = b"B", b"\x8e", b"\x96"
_WITH_LENGTH = struct.Struct("<cQ")
# The pickler puts no frame around less than four bytes.
_UNFRAMED = 3

_forking_pickler: Any = ForkingPickler
# Reducers that go before multiprocessing's.
ahead: dict[type, Callable[[Any], Any]] = {}
_reducers: Any = ChainMap(ahead, _forking_pickler._extra_reducers, copyreg.dispatch_table)


class _Pickler(pickle.Pickler):
    """ForkingPickler without its constructor, which costs more than most pickles."""

    dispatch_table = _reducers


class _File:
    """Its ``write`` is that of a list, so that small pickles cost no call of Python code."""

    __slots__ = ("write",)

    write: Callable[[Any], None]


def _announcement(data: Any) -> bytes:
    if type(data) is bytearray:
        return _WITH_LENGTH.pack(_BYTEARRAY8, len(data))
    if type(data) is not bytes:
        return b""
    if len(data) > 0xFFFFFFFF:
        return _WITH_LENGTH.pack(_BINBYTES8, len(data))
    return struct.pack("<cI", _BINBYTES, len(data))


def _announces(written: Buffer, announcement: bytes) -> bool:
    """
    Say whether what was written last ends with just this announcement.

    Bytes inside of a frame may happen to look like it. So it counts only behind the frame, where
    the pickler puts nothing else.
    """
    if type(written) is not bytes or not written.endswith(announcement):
        return False
    start = 2 if written.startswith(_PROTO) else 0
    if written.startswith(_FRAME, start):
        start += _WITH_LENGTH.size + _WITH_LENGTH.unpack_from(written, start)[1]
    return start <= len(written) - len(announcement) <= start + _UNFRAMED


class Unfinished:
    """What is to be a bytes object, still in other memory."""

    __slots__ = ("content",)

    def __init__(self, content: memoryview) -> None:
        self.content = content


def load(pickled: Buffer, buffers: list[Any]) -> Any:
    """Undo ``dump``; may raise anything, as it runs the code of the pickled classes."""
    if not buffers:
        return pickle.loads(pickled)  # noqa: S301
    finished = (bytes(each.content) if type(each) is Unfinished else each for each in buffers)
    return pickle.loads(pickled, buffers=finished)  # noqa: S301


def dump(value: Any) -> list[Buffer]:
    """Pickle ``value`` the way multiprocessing does: the pickle, then its out-of-band buffers."""
    if value is None:  # as of most jobs that are called for what they do
        return [_NONE]
    if type(value) in _PLAIN:
        return [pickle.dumps(value, 5)]
    # What the pickler writes, and among it, in their order, the buffers.
    pieces: list[Any] = []

    def in_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:  # not contiguous
            return True
        if raw.nbytes < _OUT_OF_BAND:
            return True
        pieces.append(raw)
        return False

    file: Any = _File()
    file.write = pieces.append
    _Pickler(file, 5, buffer_callback=in_band).dump(value)
    return pieces if len(pieces) == 1 else _sorted(pieces)


def _sorted(pieces: list[Any]) -> list[Buffer]:
    written: list[Buffer] = []
    buffers: list[Buffer] = []
    for piece in pieces:
        if type(piece) is memoryview:
            buffers.append(piece)
            continue
        if len(piece) >= LARGE and written:
            announcement = _announcement(piece)
            if announcement and _announces(written[-1], announcement):
                written[-1] = bytes(written[-1][: -len(announcement)]) + _NEXT_BUFFER
                buffers.append(piece)
                continue
        written.append(piece)
    return [b"".join(written), *buffers]
