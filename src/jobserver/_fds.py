# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Hand descriptors over a Unix socket (SCM_RIGHTS)."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence

from . import _forking
from ._forking import AF_UNIX, PlainSocket
from ._signals import lifted
from ._wire import IOV_MAX, TASK, Buffer, Pieces, brief_frame, write_all

# The kernel takes at most 253 in one message (SCM_MAX_FD).
MOST = 250
# For every recvmsg: Python leaves what it receives inheritable. A command that a job starts, and
# that outlives it, would keep its slot locked.
CLOEXEC = socket.MSG_CMSG_CLOEXEC
_COUNT = struct.Struct("<I")
_INT = struct.Struct("i")
_NO_FDS = _COUNT.pack(0)


def adopt(fd: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a socket object for a Unix socket, whose mode (blocking or not) stays as it is."""
    # A default timeout, set by the user for other sockets than ours, would make it non-blocking.
    blocking = None if socket.getdefaulttimeout() is None else os.get_blocking(fd)
    sock: socket.socket = PlainSocket(AF_UNIX, kind, 0, fd)
    if blocking is not None:
        sock.setblocking(blocking)
    return sock


def send_fds(sock: socket.socket, fds: Sequence[int]) -> None:
    """Send any number of descriptors, with their count ahead of them; waits if it must."""
    rest = list(fds)
    data = _COUNT.pack(len(rest))
    while data or rest:
        now, rest = rest[:MOST], rest[MOST:]
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", now))] if now else []
        while True:
            try:
                sent = sock.sendmsg([data or b"+"], ancillary, socket.MSG_NOSIGNAL)
                break
            except BlockingIOError:
                _writable(sock)
        data = data[sent:]


def send_job(sock: socket.socket, fds: Sequence[int], pieces: Pieces) -> None:
    """
    Send descriptors and a frame, in one system call if possible, on a non-blocking stream.

    Waits whenever the other side is behind. If segments are lent, returns when they are taken.
    """
    lender = pieces.lender
    if lender is None:
        _send_job(sock, fds, pieces)
        return
    try:
        ours, theirs = _forking.open_sockets(socket.SOCK_STREAM)
    except OSError:  # no descriptors left
        _send_job(sock, fds, pieces.whole())
        return
    try:
        try:
            _send_job(sock, [*fds, theirs.fileno()], pieces[: -pieces.lent])
        finally:
            _forking.close_socket(theirs)
        ours.setblocking(False)
        with contextlib.suppress(ConnectionError):  # closed: so all has been taken
            send_all(ours, pieces[-pieces.lent :])
    finally:
        lender.end()
        _forking.close_socket(ours)


def send_small_job(sock: socket.socket, pickled: bytes) -> None:
    """Send a job that is a small pickle and nothing else; see ``send_job``."""
    data = _NO_FDS + brief_frame(TASK, pickled)
    try:
        sent = sock.send(data, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        sent = 0
    if sent < len(data):
        send_all(sock, [memoryview(data)[sent:]])


def _send_job(sock: socket.socket, fds: Sequence[int], pieces: Sequence[Buffer]) -> None:
    if len(fds) > MOST:
        send_fds(sock, fds)
        send_all(sock, pieces)
        return
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    head = _COUNT.pack(len(fds))
    if len(pieces) == 1:
        head += pieces[0]
        pieces = ()
    while True:
        try:
            if not (fds or pieces):
                sent = sock.send(head, socket.MSG_NOSIGNAL)
                break
            sent = sock.sendmsg([head, *pieces[: IOV_MAX - 1]], ancillary, socket.MSG_NOSIGNAL)
            break
        except BlockingIOError:
            _writable(sock)
    if sent < len(head):
        send_all(sock, [memoryview(head)[sent:], *pieces])
    elif pieces:
        send_all(sock, _after(pieces, sent - len(head)))


def _after(pieces: Sequence[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of ``pieces`` after so many bytes."""
    rest: list[Buffer] = []
    for piece in pieces:
        size = memoryview(piece).nbytes
        if sent >= size:
            sent -= size
            continue
        rest.append(memoryview(piece).cast("B")[sent:])
        sent = 0
    return rest


def refuse_truncated(flags: int) -> None:
    """Raise OSError if a message was to bring more descriptors than this process may have."""
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "no descriptor is left for those that come along")


def fds_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in a received message."""
    found: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % _INT.size
            for place in range(0, whole, _INT.size):
                (fd,) = _INT.unpack_from(data, place)
                found.append(fd if fd > 2 else _forking.lifted(fd))
    return found


def send_all(sock: socket.socket, pieces: Sequence[Buffer]) -> None:
    """Send all pieces on a non-blocking stream; waits whenever the other side is behind."""

    def write(views: list[memoryview]) -> int:
        while True:
            try:
                return sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                _writable(sock)

    write_all(pieces, write)


def _writable(sock: socket.socket) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    with lifted():
        poller.poll()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
