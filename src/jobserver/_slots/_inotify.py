# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Hear of it when somebody opens, reads or writes a FIFO.

Nothing else tells that: a FIFO that is drained can be polled for, but not one that is read from.
"""

from __future__ import annotations

import ctypes
import os
import struct

_IN_ACCESS = 0x1
_IN_MODIFY = 0x2
_IN_CLOSE = 0x18
_IN_OPEN = 0x20
_IN_IGNORED = 0x8000
_IN_ONESHOT = 0x80000000
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_HEADER = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)
# Descriptor -> the number of the watch that ``watch`` has set.
_watches: dict[int, int] = {}


def watch(fifo: int, *, closings: bool = False, spare: int = -1) -> int:
    """
    Return a descriptor that is readable once something happens to the FIFO behind ``fifo``.

    Args:
        fifo: The FIFO.
        closings: Hear of it being opened and closed, rather than opened, read and written.
        spare: What is left after ``unwatch``, to be used again; -1 for nothing.

    Raises:
        OSError: The system gives no more of these.
    """
    fd: int = spare if spare >= 0 else _libc.inotify_init1(_FLAGS)
    if fd < 0:
        raise _error()
    drain(fd)
    path = f"/proc/self/fd/{fifo}".encode()
    mask = _IN_OPEN | (_IN_CLOSE if closings else _IN_ACCESS | _IN_MODIFY)
    number = _libc.inotify_add_watch(fd, path, mask)
    if number < 0:
        error = _error()
        if spare < 0:
            os.close(fd)
        raise error
    _watches[fd] = number
    return fd


def unwatch(fd: int) -> None:
    """Hear of nothing any more. To close the descriptor takes the kernel milliseconds instead."""
    _libc.inotify_rm_watch(fd, _watches.pop(fd))


def listen(fd: int, fifo: int, *, openings: bool) -> int:
    """
    Hear, once, of it when the FIFO behind ``fifo`` is read from, or opened; returns a number.

    Args:
        fd: What ``watch`` has returned.
        fifo: Another FIFO.
        openings: Of it being opened, rather than read from. Not each kernel reports a splice.

    Raises:
        OSError: The system gives no more of these.
    """
    mask = _IN_ONESHOT | (_IN_OPEN if openings else _IN_ACCESS)
    number: int = _libc.inotify_add_watch(
        fd, f"/proc/self/fd/{fifo}".encode(), ctypes.c_uint32(mask)
    )
    if number < 0:
        raise _error()
    return number


def ignore(fd: int, number: int) -> None:
    """Do not listen any more; ``number`` may have been heard of already."""
    _libc.inotify_rm_watch(fd, number)


def drain(fd: int) -> tuple[bool, bool]:
    """Forget what has happened so far; says whether that was an opening, or elsewhere."""
    opened = elsewhere = False
    while True:
        try:
            events = os.read(fd, 65536)
        except BlockingIOError:
            return opened, elsewhere
        place = 0
        while place < len(events):
            number, mask, _, length = _HEADER.unpack_from(events, place)
            if number == _watches.get(fd):
                opened = opened or bool(mask & _IN_OPEN)
            elif not mask & _IN_IGNORED:
                elsewhere = True
            place += _HEADER.size + length


def _error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
