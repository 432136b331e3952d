# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The client of the zygote: one small process for a whole tree, which forks workers on request.

Guarantees:

* The zygote is started by the first process that needs one, and inherited by all jobs it forks:
  they reach it through the *door*, an anonymous socket. Nothing listens anywhere.
* Each client process has a connection of its own. Replies carry the number of the request, so one
  that was given up (Ctrl-C) does not confuse the next.
* The zygote ends when its owner does, however that ends: it holds the reading end of a pipe whose
  only writing end is the owner's.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from typing import Any, Callable, Optional

from jobserver import _forking
from jobserver._fds import CLOEXEC, adopt, fds_of
from jobserver._worker._protocol import (
    EXITED,
    FAILED,
    FORK,
    INT,
    MESSAGE,
    PING,
    QUERY,
    READY,
    RIGHTS,
    SPACE,
    THREADED,
)

from ._command import start_interpreter
from ._prep import foundations, surroundings

_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_LENGTH = struct.Struct("<Q")


class ZygoteDied(Exception):
    """The zygote has gone; a new one may be started."""


class ZygoteClient:
    """This process's way to the zygote of its tree."""

    def __init__(self, door: Optional[socket.socket], known: dict[str, Any]) -> None:
        # What the workers of this zygote know already of their surroundings.
        self.known = known
        self._door = door
        self._alive = -1
        self._pid = -1
        self._connection: Optional[socket.socket] = None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        # Of which workers the exit status may yet be wanted, and those that are known.
        self._awaited: set[int] = set()
        self._exits: dict[int, int] = {}
        _forking.track(self, at_leisure=True)

    def launch(
        self, theirs: socket.socket
    ) -> tuple[int, int, Callable[[int, bool], Optional[int]]]:
        """
        Have a worker forked that owns ``theirs``.

        Returns:
            Its pid, its pidfd, and what tells its exit status.

        Raises:
            ZygoteDied: Perhaps when the worker had been forked. The next call starts another one.
            OSError: The zygote cannot fork, or there is no descriptor left.
        """
        with self._lock:
            # Numbers go on when the zygote is replaced, so none is ever asked for at another one.
            number = next(self._numbers)
            try:
                kind, value, fds = self._request(FORK, number, os.getpid(), theirs.fileno())
            except ZygoteDied:
                self._forget()
                raise
        if kind == FAILED:
            raise OSError(value, f"the zygote cannot fork a worker: {os.strerror(value)}")
        if not fds:
            # Its pidfd was lost on the way. The worker ends when its channel is closed.
            raise OSError(errno.EMFILE, "no descriptor is left to watch a worker by")
        connection = self._connection
        self._awaited.add(number)
        return value, fds[0], lambda _pidfd, asked: self._exit_status(number, connection, asked)

    def _exit_status(
        self,
        number: int,
        connection: Optional[socket.socket],
        asked: bool,
    ) -> Optional[int]:
        """Return the exit status of a worker that has ended; None when its zygote is gone, too."""
        with self._lock:
            # That of a worker that has answered is of no interest, and to ask is to wait.
            if asked and number not in self._exits and connection is self._connection is not None:
                with contextlib.suppress(ZygoteDied, OSError):
                    self._request(QUERY, number)
            self._awaited.discard(number)
            return self._exits.pop(number, None)

    def _request(
        self, kind: int, number: int, value: int = 0, fd: int = -1
    ) -> tuple[int, int, list[int]]:
        connection = self._connection or self._connect()
        ancillary = []
        if fd >= 0:
            ancillary = [(*RIGHTS, INT.pack(fd))]
        try:
            connection.sendmsg([MESSAGE.pack(kind, number, value)], ancillary, _NOSIGNAL)
            return self._reply(connection, number)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ZygoteDied from error

    def _reply(self, connection: socket.socket, number: int) -> tuple[int, int, list[int]]:
        while True:
            data, ancillary, _flags, _address = connection.recvmsg(MESSAGE.size, SPACE, CLOEXEC)
            fds = fds_of(ancillary) if ancillary else []
            if not data:
                raise ZygoteDied
            kind, answered, value = MESSAGE.unpack(data)
            if kind == EXITED and answered in self._awaited:
                self._exits[answered] = value
            if answered == number:
                return kind, value, fds
            for fd in fds:  # of a request that was given up; its worker finds its channel closed
                os.close(fd)

    def _connect(self) -> socket.socket:
        if self._door is None:
            self._start(import_main=True)
        if self._connection is not None:  # which starting has made
            return self._connection
        assert self._door is not None  # noqa: S101
        ours, theirs = _forking.open_sockets(socket.SOCK_SEQPACKET)
        ancillary = [(*RIGHTS, INT.pack(theirs.fileno()))]
        try:
            self._door.sendmsg([b"+"], ancillary, socket.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError) as error:
            _forking.close_socket(ours)
            raise ZygoteDied from error
        finally:
            _forking.close_socket(theirs)
        self._connection = ours
        return ours

    def _start(self, *, import_main: bool) -> None:
        """Start a zygote and wait until it is ready."""
        known = surroundings()
        # Imported if the program has said what to preload; it would bring much along to the zygote.
        preload: Any = sys.modules.get("multiprocessing.forkserver")
        preload = getattr(preload, "_forkserver", None)
        names: list[str] = preload._preload_modules if preload is not None else []
        told = {
            **foundations(),
            **known,
            "import_main": import_main,
            "interrupts": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "preload": [name for name in names if name != "__main__"],
        }
        door, server = _forking.open_sockets(socket.SOCK_SEQPACKET)
        reader, writer = _forking.open_pipe()
        try:
            self._pid = start_interpreter(
                "jobserver._worker._zygote", [server.fileno(), door.fileno(), reader]
            )
        except BaseException:
            _forking.close(writer)
            _forking.close_socket(door)
            raise
        finally:
            _forking.close_socket(server)
            _forking.close(reader)
        self.known, self._door, self._alive = known, door, writer
        _forking.owned.discard(door.fileno())  # forked jobs go through it, too
        self._tell(pickle.dumps(told))
        try:
            kind, _value, _fds = self._request(PING, 0)
        except ZygoteDied:
            status = self._forget()
            raise RuntimeError(
                f"the zygote of the start method 'forkserver' ended with exit status {status}"
                " before it was ready; what it printed tells more"
            ) from None
        if kind == THREADED:
            # Importing main has left threads running: nothing that is forked from there is safe.
            self._forget()
            self._start(import_main=False)
        elif kind != READY:
            raise AssertionError(kind)

    def _tell(self, data: bytes) -> None:
        data = _LENGTH.pack(len(data)) + data
        try:
            while data:
                data = data[os.write(self._alive, data) :]
        except BrokenPipeError:
            return  # it has died: the request that follows finds out

    def _forget(self) -> Optional[int]:
        """Let go of a zygote that has died, or that is to end."""
        status = None
        for sock in (self._connection, self._door):
            if sock is not None:
                _forking.close_socket(sock)
        self._connection = self._door = None
        if self._alive >= 0:
            _forking.close(self._alive)
            self._alive = -1
            if self._pid > 0:
                with contextlib.suppress(ChildProcessError):
                    status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return status

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """Keep the door; the connection and the ownership are the parent's, and closed here."""
        self._lock = threading.Lock()
        self._awaited, self._exits = set(), {}
        if self._connection is not None:
            self._connection.detach()
            self._connection = None
        self._alive = -1

    def end(self) -> None:
        """At the end of this process: let the zygote end, too."""
        self._pid = -1
        self._forget()


_client = ZygoteClient(None, {})


@atexit.register
def _end() -> None:
    _client.end()


def client() -> ZygoteClient:
    """Return this process's client."""
    return _client


def inherit_door(door: int, known: dict[str, Any]) -> None:
    """In a worker that a zygote has forked: reach the same zygote through the same door."""
    global _client  # noqa: PLW0603
    _client = ZygoteClient(adopt(door, socket.SOCK_SEQPACKET), known)
