# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Hand descriptors over a Unix socket (SCM_RIGHTS)."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Sequence

from ._wire import Buffer

# The kernel takes at most 253 in one message (SCM_MAX_FD).
MOST = 250
_COUNT = struct.Struct("<I")
_IOV_MAX = 1024


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


def send_job(sock: socket.socket, fds: Sequence[int], pieces: Sequence[Buffer]) -> None:
    """Send what ``send_fds`` and then ``send_all`` would, in one system call if possible."""
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
            sent = sock.sendmsg([head, *pieces[: _IOV_MAX - 1]], ancillary, socket.MSG_NOSIGNAL)
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


def receive_fds(sock: socket.socket) -> list[int]:
    """Receive what ``send_fds`` sent, on a blocking stream; all of it close-on-exec."""
    fds: list[int] = []
    head = b""
    while len(head) < _COUNT.size:
        head += _receive(sock, _COUNT.size - len(head), fds)
    (count,) = _COUNT.unpack(head)
    while len(fds) < count:
        _receive(sock, 1, fds)
    return fds


def _receive(sock: socket.socket, size: int, fds: list[int]) -> bytes:
    data, ancillary, _flags, _address = sock.recvmsg(size, socket.CMSG_SPACE(MOST * 4))
    fds += fds_of(ancillary)
    if not data:
        raise EOFError
    return data


def fds_of(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors in a received message; Python has made them close-on-exec."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def send_all(sock: socket.socket, pieces: Sequence[Buffer]) -> None:
    """Send all pieces on a non-blocking stream; waits whenever the other side is behind."""
    pending = [memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes]
    while pending:
        try:
            sent = sock.sendmsg(pending[:_IOV_MAX], (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            _writable(sock)
            continue
        while pending and sent >= pending[0].nbytes:
            sent -= pending.pop(0).nbytes
        if sent:
            pending[0] = pending[0][sent:]


def _writable(sock: socket.socket) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    poller.poll()


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
