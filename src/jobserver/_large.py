# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Large buffers: memory to receive them in, and the shortest way there.

The sender *lends* its buffers: it tells where in its memory they are, and keeps them as they are
until the receiver has taken them. The receiver *fetches* them from there: one copy, made by the
kernel, into memory of its own that nobody has had to clear before and that comes in huge pages
where the kernel has them to give.

Guarantees:

* Nothing is shared, and nothing has a name: no file, no segment of shared memory. What a process
  leaves behind when it is killed is what any process leaves, which is nothing.
* What is fetched is what was lent. The sender has a random token in its memory for as long as it
  lends, and every fetch reads the token after the data: another process that has got the same
  process id, or a sender that has changed its mind, does not have it there.
* Nothing depends on it. The kernel may refuse to let one process read another's memory (other
  users, Yama, seccomp), and an interpreter may come without ctypes: then the bytes take the
  channel.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from typing import Any, Optional

from ._dump import Buffer, Unfinished

# Below so much in all, lending takes longer than the channel does; importing ctypes for it, too.
_WORTH_LENDING = 1 << 21
_WORTH_IMPORTING = 1 << 24
# From this size on, huge pages are asked for.
_HUGE = 1 << 21
_LENDER = struct.Struct("<QQ16s")  # process id, where the token is, the token

_native: Any = None


def _native_for(size: int) -> Any:
    """Return the module with the C interfaces; False if there is none, or it is not worth it."""
    global _native  # noqa: PLW0603
    if _native is None:
        if size < _WORTH_IMPORTING and "ctypes" not in sys.modules:
            return False
        try:
            from . import _native as found

            _native = found
        except Exception:  # noqa: BLE001  # no ctypes, no such function, no memory to execute
            _native = False
    return _native


def prepare() -> None:
    """Before forking workers: import what they would import otherwise, if it costs little."""
    _native_for(0)


def allocate(kind: type, length: int) -> tuple[Any, memoryview]:
    """
    Return memory to be filled: what the unpickler gets, and a view to write to.

    Args:
        kind: What the unpickler expects: ``bytes``, ``bytearray``, or ``memoryview`` for any
            buffer.
        length: How many bytes.
    """
    # All of it is about to be written, and faults for small pages cost more than the bytes.
    huge = length >= _HUGE
    if kind is not memoryview:
        native = _native_for(length)
        if native:
            made: tuple[Any, memoryview] = native.new(kind, length, huge=huge)
            return made
    if kind is bytearray:
        array = bytearray(length)
        return array, memoryview(array)
    import mmap  # a library that few workers need

    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (AttributeError, OSError):
            pass  # a kernel without them
    view = memoryview(memory)
    return (Unfinished(view) if kind is bytes else view), view


class Lender:
    """The sender's side, for one frame."""

    def __init__(self, native: Any, buffers: Sequence[Buffer]) -> None:
        self._token = bytearray(os.urandom(16))
        self._token_address: int = native.address_of(self._token)
        self._addresses = [native.address_of(buffer) for buffer in buffers]

    def head(self) -> bytes:
        """Return what the receiver needs to know."""
        me = _LENDER.pack(os.getpid(), self._token_address, bytes(self._token))
        return me + struct.pack(f"<{len(self._addresses)}Q", *self._addresses)

    def end(self) -> None:
        """From now on the buffers may change: whoever fetches them nevertheless finds out."""
        self._token[:] = bytes(len(self._token))


def lend(buffers: Sequence[Buffer]) -> Optional[Lender]:
    """Lend buffers; None if it is not worth it, or not possible."""
    total = sum(map(len, buffers))
    native = total >= _WORTH_LENDING and _native_for(total)
    return Lender(native, buffers) if native else None


class Loan:
    """The receiver's side, for one frame."""

    def __init__(self, head: Buffer, targets: Sequence[memoryview]) -> None:
        """Take what ``Lender.head`` has told, and a target for each of its buffers."""
        self._pid, self._token_address, self._token = _LENDER.unpack_from(head)
        addresses = struct.unpack_from(f"<{len(targets)}Q", head, _LENDER.size)
        self._rest = list(zip(targets, addresses))[::-1]
        self._native = _native_for(sum(map(len, targets)))

    def fetch(self, most: int) -> int:
        """Fetch up to ``most`` bytes; returns how many, 0 if they cannot be had in this way."""
        if not self._native:
            return 0
        target, address = self._rest.pop()
        part = target[:most]
        token = bytearray(len(self._token))
        if not self._native.read_memory(self._pid, address, part, self._token_address, token):
            return 0
        if token != self._token:
            return 0
        if len(part) < len(target):
            self._rest.append((target[most:], address + most))
        return len(part)

    @property
    def complete(self) -> bool:
        """Whether all has been fetched."""
        return not self._rest
