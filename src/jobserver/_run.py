# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Run a foreign command on slots of ours, and wait for it.

No thread: the waiting call itself copies the streams, offers slots to the command, reaps jobs and
issues callbacks. All that the command is waited for by is in one epoll of its own, which lies in
the reactor's, as epolls may.

If this process is killed its slots come back, though the command may run on for as long as it
likes: it is not ours to kill then.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

from . import _forking
from ._admission import TICK
from ._callbacks import issue_due
from ._ending import warn_suppressed
from ._errors import CallbackRaised
from ._holding import Holding
from ._slots._announce import ChildEnv
from ._slots._shadow import Shadow

if TYPE_CHECKING:
    from ._shared import Shared

Command = Union[str, bytes, "os.PathLike[Any]", Sequence[Any]]

# Tools that look for slots as soon as they start; some look again only when a command of theirs
# has ended.
_BUILDERS = ("make", "gmake", "ninja", "samu", "cargo")
_CHUNK = 1 << 16
# A command that has got the same Ctrl-C as we ends by itself, if it is given a moment.
_SIGINT_GRACE = 0.25


def run(
    shared: Shared,
    command: Command,
    style: str,
    timeout: Optional[float],
    deadline: Optional[float],
    given: Any,
    *,
    check: bool,
    popen: dict[str, Any],
) -> subprocess.CompletedProcess[Any]:
    """
    Take a slot, run the command on it, return what came of it.

    Args:
        shared: The pool.
        command: As for ``subprocess.Popen``.
        style: How MAKEFLAGS is to tell of the slots.
        timeout: What to say that the time was, when it is over.
        deadline: When it is.
        given: The command's input; None for none.
        check: Raise CalledProcessError unless the exit status is 0.
        popen: More for ``subprocess.Popen``.
    """
    holding = Holding(shared, None)
    holding.take(deadline)
    try:
        with contextlib.closing(Shadow(shared.slots, time.monotonic())) as shadow:
            conduct = Conduct(shared, shadow, given)
            try:
                conduct.start(command, style, popen)
                finished = conduct.wait(deadline)
            except BaseException as error:
                conduct.abort(error)
                raise
            finally:
                conduct.close()
    finally:
        holding.put_down()
    if not finished:
        raise subprocess.TimeoutExpired(
            conduct.args, timeout or 0, output=conduct.raw("stdout"), stderr=conduct.raw("stderr")
        )
    out, err = conduct.text("stdout"), conduct.text("stderr")
    if check and conduct.returncode:
        raise subprocess.CalledProcessError(conduct.returncode, conduct.args, out, err)
    return subprocess.CompletedProcess(conduct.args, conduct.returncode, out, err)


class Conduct:
    """
    One command, from its start to its end.

    Args:
        shared: The pool.
        shadow: What the command takes slots from.
        given: Its input.
    """

    def __init__(self, shared: Shared, shadow: Shadow, given: Any) -> None:
        self._shared = shared
        self._shadow = shadow
        self._given = given
        self._input = memoryview(b"")
        self._output: dict[str, list[bytes]] = {}
        self._codecs: dict[str, tuple[str, str]] = {}
        self._pidfd = -1
        self._popen: Any = None
        self._streams: dict[int, str] = {}
        with _forking.books_lock():
            self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
            _forking.owned.add(self._epoll.fileno())

    @property
    def args(self) -> Any:
        """The command, as it was given."""
        return self._popen.args

    @property
    def returncode(self) -> int:
        """Its exit status, or minus the signal that ended it."""
        return int(self._popen.returncode)

    def start(self, command: Command, style: str, popen: dict[str, Any]) -> None:
        """Start the command, with the shadow's FIFO in its environment."""
        base = popen.pop("env", None)
        slots = self._shared.slots.slots
        with ChildEnv(self._shadow.fifo, slots, style, {}, _decoded(base)) as env:
            self._shadow.look()
            if popen.get("close_fds", True):
                popen["pass_fds"] = (*popen.get("pass_fds", ()), *env.pass_fds)
            else:
                for fd in env.pass_fds:
                    os.set_inheritable(fd, True)
            if _is_builder(command):
                self._shadow.fill(time.monotonic())
            self._popen = subprocess.Popen(command, env=env, **popen)
        self._shadow.pid = self._popen.pid
        self._pidfd = os.pidfd_open(self._popen.pid)
        _forking.owned.add(self._pidfd)
        self._epoll.register(self._pidfd, select.EPOLLIN)
        if self._shadow.watch >= 0:
            self._epoll.register(self._shadow.watch, select.EPOLLIN)
        for name in ("stdin", "stdout", "stderr"):
            self._attach(name)

    def _attach(self, name: str) -> None:
        stream = getattr(self._popen, name)
        if stream is None:
            return
        fd = stream.fileno()
        _forking.owned.add(fd)
        if hasattr(stream, "encoding"):
            self._codecs[name] = (stream.encoding, stream.errors)
        if name != "stdin":
            self._output[name] = []
        else:
            self._input = memoryview(self._encoded())
        if name == "stdin" and not self._input:
            self._detach(name)
            return
        os.set_blocking(fd, False)
        self._streams[fd] = name
        self._epoll.register(fd, select.EPOLLOUT if name == "stdin" else select.EPOLLIN)

    def _encoded(self) -> Any:
        if self._given is None:
            return b""
        if "stdin" not in self._codecs:
            return self._given
        # As a text stream would write it, whose line ends are those of the system.
        return self._given.encode(*self._codecs["stdin"])

    def _detach(self, name: str) -> None:
        stream = getattr(self._popen, name)
        fd = stream.fileno()
        if self._streams.pop(fd, None):
            self._epoll.unregister(fd)
        _forking.owned.discard(fd)
        with contextlib.suppress(BrokenPipeError):
            stream.close()

    def wait(self, deadline: Optional[float]) -> bool:
        """Wait for its end and that of its streams; False if the deadline came first."""
        reactor, slots, shadow = self._shared.reactor, self._shared.slots, self._shadow
        events: list[tuple[int, int]] = []

        def test() -> bool:
            events[:] = self._epoll.poll(0)
            reactor.crew.unload()  # what workers at rest keep is free, too
            if events or (shadow.hungry and shadow.seek()) or self._callbacks_due():
                return True
            return shadow.short and slots.free() > 0

        while True:
            self._issue_callbacks()
            if self._pidfd >= 0:
                shadow.step(time.monotonic())
            if self._pidfd < 0 and not self._streams:
                return True
            wants = shadow.hungry or shadow.short
            ends = [end for end in (deadline, shadow.wake_at) if end is not None]
            happened = reactor.wait(
                test,
                min(ends, default=None),
                arm=[self._epoll.fileno(), *(slots.filenos() if wants else ())],
                tick=TICK if shadow.hungry else None,
                on_tick=slots.sweep,
            )
            if happened:
                self._handle(events)
            elif deadline is not None and time.monotonic() >= deadline:
                self._popen.kill()
                self._popen.wait()
                return False

    def _handle(self, events: Sequence[tuple[int, int]]) -> None:
        for fd, _mask in events:
            if fd == self._pidfd:
                self._popen.wait()
                self._close_pidfd()
                if self._shadow.watch >= 0:
                    self._epoll.unregister(self._shadow.watch)
                self._shadow.release()
            elif fd in self._streams:
                self._copy(fd, self._streams[fd])

    def _copy(self, fd: int, name: str) -> None:
        try:
            if name == "stdin":
                self._input = self._input[os.write(fd, self._input[:_CHUNK]) :]
                ended = not self._input
            else:
                piece = os.read(fd, _CHUNK)
                self._output[name].append(piece)
                ended = not piece
        except BlockingIOError:
            return
        except BrokenPipeError:
            ended = True  # the command does not want to read more
        if ended:
            self._detach(name)

    def _callbacks_due(self) -> bool:
        return self._shared.admission.callbacks_due()

    def _issue_callbacks(self) -> None:
        # The command cannot be run again just to have its result, as another call could.
        while True:
            try:
                issue_due(self._shared.reactor)
            except CallbackRaised as raised:
                warn_suppressed(raised)
            else:
                return

    def abort(self, error: BaseException) -> None:
        """Something has gone wrong here: end the command, as ``subprocess.run`` does."""
        if self._popen is None or self._popen.returncode is not None:
            return
        if isinstance(error, KeyboardInterrupt):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_SIGINT_GRACE)
        self._popen.kill()
        self._popen.wait()

    def close(self) -> None:
        """Close all descriptors."""
        for name in ("stdin", "stdout", "stderr"):
            stream = None if self._popen is None else getattr(self._popen, name)
            if stream is not None and not stream.closed:
                self._detach(name)
        self._close_pidfd()
        fd = self._epoll.fileno()
        self._shared.reactor.disarm(fd)
        with _forking.books_lock():
            _forking.owned.discard(fd)
            self._epoll.close()

    def _close_pidfd(self) -> None:
        fd, self._pidfd = self._pidfd, -1
        if fd >= 0:
            self._epoll.unregister(fd)
            _forking.close(fd)

    def raw(self, name: str) -> Optional[bytes]:
        """Return what has been read from a stream so far; None if it was not captured."""
        return b"".join(self._output[name]) if name in self._output else None

    def text(self, name: str) -> Any:
        """Return it as text, if that was asked for."""
        found = self.raw(name)
        if found is None or name not in self._codecs:
            return found
        return found.decode(*self._codecs[name]).replace("\r\n", "\n").replace("\r", "\n")


def _is_builder(command: Any) -> bool:
    words = command if isinstance(command, (list, tuple)) else [command]
    if not words or not isinstance(words[0], (str, bytes, os.PathLike)):
        return False
    name = os.path.basename(os.fsdecode(words[0])).split(" ", 1)[0]
    return name.split("-", 1)[0] in _BUILDERS


def _decoded(env: Optional[Mapping[Any, Any]]) -> Optional[dict[str, str]]:
    if env is None:
        return None
    return {os.fsdecode(name): os.fsdecode(value) for name, value in env.items()}
