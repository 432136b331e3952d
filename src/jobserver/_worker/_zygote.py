# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The zygote: imports the main module once, then forks workers on request.

Guarantees:

* One thread. It blocks in one epoll on: the pipe from its owner (end-of-file ends it), the door
  (new clients), its clients, and the pidfds of its workers.
* A worker's pidfd is on its way to the client before the worker can be reaped.
* A client that is slow to read holds up nobody: what cannot be sent now is queued for it.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from contextlib import suppress
from multiprocessing import process, spawn
from time import thread_time
from types import FrameType
from typing import Any, NoReturn, Optional

# All that a worker needs is imported here, once, so that no worker has to.
from jobserver import (
    _forking,
    _jobserver,  # noqa: F401
    _large,
    _map,  # noqa: F401
)
from jobserver._collapse import DEAR, forked
from jobserver._errors import Unguarded
from jobserver._fds import CLOEXEC, adopt, fds_of
from jobserver._launch._zygote import inherit_door
from jobserver._reactor import active_reactors  # noqa: F401

from ._process import Identity, forget_program, report, shut_stdin
from ._protocol import (
    EXITED,
    FAILED,
    FORK,
    INT,
    LAUNCHED,
    MESSAGE,
    PING,
    QUERY,
    READY,
    RIGHTS,
    SPACE,
    THREADED,
)
from ._rehearsal import rehearse
from ._remote import Heritage, serve

_AT_ONCE = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
# What a fresh child looks up as an attribute of a module costs it a page or two more.
_close = os.close
_LENGTH = struct.Struct("<Q")


def main(server: int, door: int, alive: int) -> NoReturn:
    """Serve until the owner is gone."""
    for fd in (server, door, alive):
        os.set_inheritable(fd, False)
    # Ctrl-C is for the program; workers get their own handler back.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Ignored in the program, it would still be here, and nobody could reap the workers.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = pickle.loads(_read_exactly(alive, _LENGTH.unpack(_read_exactly(alive, 8))[0]))  # noqa: S301
    # But the program waits for the import of main, and main may be such that it never ends.
    if told.pop("interrupts"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    failure = _prepare(told)
    _Interrupts(os.getpid())
    threaded = len(sys._current_frames()) > 1
    shut_stdin()
    forget_program()
    _large.prepare()
    inherit_door(door, told)
    main = {key: value for key, value in told.items() if key.startswith("init_main")}
    heritage = Heritage(main, failure, Identity(0), signal.getsignal(signal.SIGINT))
    if not threaded:
        with suppress(Exception):  # it is good for nothing but speed
            rehearse()
    gc.collect()
    gc.freeze()
    _Zygote(server, alive, heritage, threaded=threaded).serve()


class _Interrupts:
    """
    What Ctrl-C does: nothing in the zygote, and in a worker whose job is not there yet its end.

    See `UNTIL_JOB`. One handler for both, since to set another costs each worker a system call, and
    as many pages as it touches.
    """

    def __init__(self, zygote: int) -> None:
        self._zygote = zygote
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:  # noqa: ARG002
        if os.getpid() != self._zygote:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = os.read(fd, count - len(data))
        if not piece:
            os._exit(0)  # the owner is gone
        data += piece
    return data


def _prepare(told: dict[str, Any]) -> Optional[RuntimeError]:
    """Import what workers will need; returns why importing the main module has failed."""
    os.environ.clear()
    os.environ.update(told["environ"])
    import_main = told.pop("import_main")
    main = {key: told.pop(key) for key in list(told) if key.startswith("init_main")}
    state: Any = process.current_process()
    state._inheriting = True
    try:
        spawn.prepare(told)  # type: ignore[attr-defined, unused-ignore]
        for name in told["preload"]:
            with suppress(ImportError):
                importlib.import_module(name)
        if import_main:
            spawn.prepare(main)  # type: ignore[attr-defined, unused-ignore]
        else:
            told.update(main)
    except Unguarded as error:
        return error
    except BaseException:  # noqa: BLE001  # SystemExit from an unguarded main, too
        return RuntimeError(f"the main module could not be imported:\n{traceback.format_exc()}")
    finally:
        del state._inheriting
    return None


class _Client:
    """A process that submits."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent: deque[tuple[bytes, int]] = deque()
        self.pids: dict[int, int] = {}  # of its workers that have not been reaped, by number
        self.queried: set[int] = set()
        self.gone = False
        self.waits = False  # for room, by our epoll

    def send(self, kind: int, number: int, value: int, fd: int = -1) -> None:
        """Send a message, now or as soon as there is room."""
        if not self.unsent and self._send(MESSAGE.pack(kind, number, value), fd):
            return
        kept = -1
        if fd >= 0:
            # Out of descriptors: the client, who misses this one, gives the worker up.
            with suppress(OSError):
                kept = os.dup(fd)
        self.unsent.append((MESSAGE.pack(kind, number, value), kept))
        self.flush()

    def flush(self) -> None:
        """Send what there is room for."""
        while self.unsent:
            data, fd = self.unsent[0]
            if not self._send(data, fd):
                return
            self.unsent.popleft()
            if fd >= 0:
                os.close(fd)

    def _send(self, data: bytes, fd: int) -> bool:
        """Say whether that is done, be it that nobody is there any more."""
        if self.gone:
            return True
        ancillary = [(*RIGHTS, INT.pack(fd))] if fd >= 0 else ()
        try:
            self.sock.sendmsg([data], ancillary, _AT_ONCE)
        except BlockingIOError:
            return False
        except OSError:
            self.gone = True
        return True


class _Zygote:
    def __init__(self, server: int, alive: int, heritage: Heritage, *, threaded: bool) -> None:
        self._server = adopt(server, socket.SOCK_SEQPACKET)
        self._alive = alive
        self._heritage = heritage
        self._threaded = threaded
        self._clients: dict[int, _Client] = {}
        # Whose a worker is, by its pidfd, and its number there.
        self._children: dict[int, tuple[_Client, int]] = {}
        self._epoll = select.epoll()
        self._parent = 0  # whose child the next worker is, as the heritage has it
        self._own = self._epoll.fileno(), server, alive
        for fd in (server, alive):
            self._epoll.register(fd, select.EPOLLIN)

    def serve(self) -> NoReturn:
        """Handle events until the owner is gone."""
        while True:
            for fd, mask in self._epoll.poll():
                child = self._children.pop(fd, None)
                if child is not None:
                    self._reap(fd, *child)
                    continue
                client = self._clients.get(fd)
                if client is not None:
                    self._attend(client, mask)
                elif fd == self._alive:
                    os._exit(0)
                elif fd == self._server.fileno():
                    self._admit()

    def _admit(self) -> None:
        _data, ancillary, _flags, _address = self._server.recvmsg(1, socket.CMSG_SPACE(4), CLOEXEC)
        for fd in fds_of(ancillary):
            self._clients[fd] = _Client(adopt(fd, socket.SOCK_SEQPACKET))
            self._epoll.register(fd, select.EPOLLIN)

    def _attend(self, client: _Client, mask: int) -> None:
        if client.unsent:
            client.flush()
        if mask != select.EPOLLOUT:
            try:
                data, ancillary, _flags, _address = client.sock.recvmsg(
                    MESSAGE.size, SPACE, CLOEXEC
                )
            except ConnectionResetError:  # gone, with replies unread
                data, ancillary = b"", []
            if not data:
                self._dismiss(client)
                return
            fds = fds_of(ancillary) if ancillary else []
            kind, number, value = MESSAGE.unpack(data)
            if kind == PING:
                client.send(THREADED if self._threaded else READY, number, 0)
            elif kind == FORK and not fds:
                # The kernel had no descriptor left here for the one that came along.
                client.send(FAILED, number, errno.EMFILE)
            elif kind == FORK:
                if value != self._parent:
                    self._heritage.identity.set_parent(value)
                    self._parent = value
                self._fork(client, number, fds[0])
            elif kind == QUERY:
                self._tell_exit(client, number)
        if client.unsent or client.waits:
            self._rearm(client)

    def _dismiss(self, client: _Client) -> None:
        client.gone = True
        client.flush()
        fd = client.sock.fileno()
        self._epoll.unregister(fd)
        del self._clients[fd]
        client.sock.close()

    def _fork(self, client: _Client, number: int, channel: int) -> None:
        began = thread_time()
        try:
            pid = _forking.fork(())
        except OSError as error:
            os.close(channel)
            client.send(FAILED, number, error.errno or 0)
            return
        if pid == 0:
            self._become_worker(channel)
        took = thread_time() - began
        os.close(channel)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            client.send(FAILED, number, error.errno or 0)
            return
        client.pids[number] = pid
        self._children[pidfd] = client, number
        self._epoll.register(pidfd, select.EPOLLIN)
        client.send(LAUNCHED, number, pid, pidfd)
        if took > DEAR:
            forked(took)

    def _become_worker(self, channel: int) -> NoReturn:
        try:
            # The objects that have these descriptors are not touched, nor ever finalized here: this
            # call does not return.
            for fd in (*self._own, *self._clients, *self._children):
                _close(fd)
            serve(channel, self._heritage, spawned=False)
        except BaseException as error:  # noqa: BLE001
            report(error)
        finally:
            os._exit(1)

    def _reap(self, pidfd: int, client: _Client, number: int) -> None:
        self._epoll.unregister(pidfd)
        _close(pidfd)
        _pid, status = os.waitpid(client.pids.pop(number), 0)
        exitcode = os.waitstatus_to_exitcode(status)
        if exitcode or number in client.queried:
            client.queried.discard(number)
            client.send(EXITED, number, exitcode)
            if client.unsent:
                self._rearm(client)

    def _tell_exit(self, client: _Client, number: int) -> None:
        if number in client.pids:
            client.queried.add(number)
        else:
            # Reaped; had it not been 0, the message would be on its way already.
            client.send(EXITED, number, 0)

    def _rearm(self, client: _Client) -> None:
        client.waits = bool(client.unsent)
        if client.sock.fileno() in self._clients:
            wanted = select.EPOLLIN | (select.EPOLLOUT if client.waits else 0)
            self._epoll.modify(client.sock.fileno(), wanted)
