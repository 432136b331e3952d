# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What a zygote and its clients say to each other: a kind, the number of the request, a value."""

from __future__ import annotations

import socket
import struct

MESSAGE = struct.Struct("<BxxxQi")

PING = 1  # -> READY, or THREADED when importing main has left threads running
FORK = 2  # with the worker's channel -> LAUNCHED (pid, with its pidfd) or FAILED (errno)
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
