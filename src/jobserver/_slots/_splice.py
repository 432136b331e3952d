# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Move one byte from pipe to pipe in one system call, on every supported Python."""

from __future__ import annotations

import array
import fcntl
import os
import sys
import termios

SPLICE_F_NONBLOCK = 2

if sys.version_info >= (3, 10):

    def move_byte(source: int, target: int) -> bool:
        """
        Move one byte; the kernel does it whole or not at all, whatever signal comes.

        Returns:
            Whether a byte was moved: False when ``source`` is empty and has no writer.

        Raises:
            BlockingIOError: ``source`` is empty or ``target`` is full.
        """
        return os.splice(source, target, 1, flags=SPLICE_F_NONBLOCK) == 1

else:
    # os.splice came with Python 3.10; before, the C library is asked directly.
    import ctypes
    import errno

    _splice = ctypes.CDLL(None, use_errno=True).splice
    _splice.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_uint,
    )
    _splice.restype = ctypes.c_ssize_t

    def move_byte(source: int, target: int) -> bool:
        """Move one byte; see the other branch."""
        while True:
            moved: int = _splice(source, None, target, None, 1, SPLICE_F_NONBLOCK)
            if moved >= 0:
                return moved == 1
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))


def waiting_bytes(fd: int) -> int:
    """Return how many bytes the pipe behind ``fd`` holds."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]
