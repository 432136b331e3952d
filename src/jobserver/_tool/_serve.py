# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
``jobserver serve``: one pool for runs that know nothing of each other.

A client that is killed has taken its tokens along, and while others live nobody can tell whose a
missing token is. But the server has the FIFO open for reading only, so the kernel tells it when
nobody has it open for writing, as every client does. In that instant no token can be in anybody's
hand, and what is missing then is lost: it is replaced, and what is too much is taken out.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import select
import shlex
import signal
import sys
from typing import Any, Optional

from jobserver._slots._inotify import drain, watch
from jobserver._slots._makeflags import is_count
from jobserver._slots._section import F_SETPIPE_SZ, PAGE
from jobserver._slots._splice import waiting_bytes

from . import UserError

_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC


def serve(path: str, slots: int, group: Optional[str]) -> int:
    """Serve ``slots`` tokens at ``path`` until told to stop; returns the exit status."""
    path = os.path.abspath(path)
    if set(path) & set(" \t\n\\$"):
        raise UserError(f"{path!r}: only make could read a path with blanks, \\ or $")
    _make_fifo(path, group)
    stop, woken = os.pipe2(_FLAGS)
    try:
        for number in _STOP:
            signal.signal(number, _ignore)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        server = Server(path, slots)
        try:
            print(_line(path, slots), flush=True)
            server.serve(stop)
        finally:
            server.close()
    finally:
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(stop)
        os.close(woken)
    return 0


def _ignore(number: int, frame: Any) -> None:
    """What is to be done is read from the descriptor."""


def _line(path: str, slots: int) -> str:
    flags = f" -j{slots} --jobserver-auth=fifo:{path}"
    return f"export MAKEFLAGS={shlex.quote(flags)}"


def _make_fifo(path: str, group: Optional[str]) -> None:
    mask = os.umask(0)
    try:
        os.mkfifo(path, 0o600)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    finally:
        os.umask(mask)
    if group is None:
        return
    try:
        os.chown(path, -1, int(group) if is_count(group) else grp.getgrnam(group).gr_gid)
        os.chmod(path, 0o660)
    except (KeyError, OSError) as error:
        os.unlink(path)
        why = error.strerror if isinstance(error, OSError) else "no such group"
        raise UserError(f"group {group}: {why}") from None


class Server:
    """
    The FIFO, and how many tokens there should be.

    Args:
        path: Where the FIFO is.
        slots: How many tokens.
    """

    def __init__(self, path: str, slots: int) -> None:
        self._path = path
        self._slots = slots
        self._fifo = os.open(path, os.O_RDONLY | _FLAGS)
        # Each byte that a client splices takes a page of the ring. More than this is a matter of
        # privilege; what does not find room is then written.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._fifo, F_SETPIPE_SZ, min(slots + 1, 256) * PAGE)
        self._watch = watch(self._fifo, closings=True)
        self._write(slots)
        drain(self._watch)

    def serve(self, stop: int) -> None:
        """Replace what is lost, until ``stop`` is readable."""
        poller = select.poll()
        poller.register(stop, select.POLLIN)
        poller.register(self._watch, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poller.poll()]
            if stop in ready:
                return
            self.repair()

    def repair(self) -> int:
        """If no client is left, make the tokens as many as they should be; returns the change."""
        while True:
            drain(self._watch)
            if not self._alone():
                return 0
            missing = self._slots - waiting_bytes(self._fifo)
            # Somebody may have come after the first look, and have taken or brought a token.
            if not missing or (not drain(self._watch)[0] and self._alone()):
                break
        if missing > 0:
            self._write(missing)
            print(f"jobserver: {missing} lost tokens replaced", file=sys.stderr, flush=True)
        elif missing < 0:
            os.read(self._fifo, -missing)
        return missing

    def _alone(self) -> bool:
        """Whether nobody has the FIFO open for writing."""
        poller = select.poll()
        poller.register(self._fifo, 0)
        return any(mask & select.POLLHUP for _, mask in poller.poll(0))

    def _write(self, count: int) -> None:
        writer = os.open(self._path, os.O_WRONLY | _FLAGS)
        try:
            os.write(writer, b"+" * count)
        finally:
            os.close(writer)

    def close(self) -> None:
        """Close the FIFO; clients that have it open go on with what is in it."""
        os.close(self._watch)
        os.close(self._fifo)
