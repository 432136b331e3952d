# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A worker in flight: its process, its channel, the job that it runs, and that job's slot."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from . import _forking
from ._errors import SubmissionDied
from ._fds import adopt
from ._reader import FrameReader
from ._slots._lease import Lease
from ._wire import STAYS, Corrupt, Frame
from ._worker._stay import Stays

if TYPE_CHECKING:
    from ._future import Future


class Started(NamedTuple):
    """
    What a launcher returns.

    ``pidfd`` is -1 where the process was reaped by somebody else before it could be opened;
    ``exit_status`` tells the exit code once the process has ended, None when nobody knows.
    The rest is about a worker that may be given more jobs: ``told`` is what it knows of this
    process's surroundings (None for one that ends with its first job), ``stays`` how long it may,
    ``bell`` the one it was born with, ``first`` what it has run before its first job, ``born`` its
    number among the forked ones.
    """

    pid: int
    pidfd: int
    channel: int
    exit_status: Callable[[], Optional[int]]
    told: Optional[dict[str, Any]] = None
    stays: Optional[Stays] = None
    bell: int = -1
    first: Optional[object] = None
    born: int = 0

    def kill(self) -> None:
        """End a worker that nobody will track, and close what belongs to it."""
        _forking.close(self.channel)
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # ended, and reaped by the zygote
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self.exit_status()
            os.close(self.pidfd)


class Flight:
    """
    One worker, until its process is reaped, and the job that it runs, until that is answered.

    The reactor calls ``on_channel`` and ``on_exit`` under its lock; neither blocks. A worker that
    stays is between jobs in the reactor's crew, or in the hand of a thread that gives it a job.
    """

    __slots__ = (
        "_reader",
        "_started",
        "_unwatch",
        "bell",
        "born",
        "channel",
        "detail",
        "exitcode",
        "exited",
        "first",
        "frame",
        "future",
        "held",
        "known",
        "lease",
        "lingers",
        "pid",
        "pidfd",
        "seat",
        "signalled",
        "sock",
        "told",
    )

    def __init__(
        self,
        started: Started,
        lease: Optional[Lease],
        unwatch: Callable[[int], None],
        future: Optional[Future[Any]],
    ) -> None:
        self.future: Optional[Future[Any]] = future  # until it has its outcome
        self._unwatch = unwatch
        # Of a worker that may stay: a socket for its channel; its seat, between jobs; the lease
        # whose description it shares; and what else it has been told or given.
        self.sock: Optional[socket.socket] = None
        self.seat: Optional[Lease] = None
        self.known: Optional[Lease] = None
        self.told: Optional[dict[str, Any]] = started.told
        self.bell: int = started.bell
        self.first: Optional[object] = started.first
        self.born: int = started.born
        if started.told is not None:
            self.sock = adopt(started.channel)
            self.known = lease
        self.held: bool = False  # a thread of ours is about to give it a job
        self.signalled: bool = False  # a signal may still be on its way to the process
        self.lingers: bool = False  # it is to end, and nobody waits for anything else from it
        self.pid: int = started.pid
        self.pidfd: int = started.pidfd
        self.channel: int = started.channel
        self.lease: Optional[Lease] = lease
        self.frame: Optional[Frame] = None
        self.exitcode: Optional[int] = None
        self.exited: bool = False
        self.detail: str = ""
        self._started = started
        self._reader = FrameReader()

    @property
    def settled(self) -> bool:
        """Whether it is known how the job ended."""
        return self.frame is not None or self.exited

    def on_channel(self) -> None:
        """Read from the channel. End-of-file alone is no death: the job may have closed it."""
        if self.frame is not None:
            return  # old news: another thread has read the answer, and nothing follows one
        try:
            self.frame = self._reader.feed(self.channel)
        except EOFError:
            self.close_channel()
            if self.pidfd < 0:
                self.on_exit()
            return
        except Corrupt as error:
            self.detail = f"its channel was garbled ({error})"
            self.close_channel()
            return
        if self.frame is not None and not self.stays:
            self.close_channel()

    @property
    def stays(self) -> bool:
        """Whether the worker has answered, and waits for its next job."""
        frame = self.frame
        return frame is not None and bool(frame.flags & STAYS) and self.sock is not None

    def on_exit(self) -> None:
        """The process has ended: what is still in the channel is all that will ever come."""
        while self.channel >= 0 and self.frame is None:
            before = self._reader.progress
            self.on_channel()
            if self._reader.progress == before:
                break
        self.exited = True
        self.exitcode = self._started.exit_status()
        self.close_channel()
        self.close_pidfd()

    def death(self) -> SubmissionDied:
        """Return the exception that tells how the worker ended."""
        return SubmissionDied(self.exitcode, self.detail)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        self.signalled = True
        try:
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            elif not self.exited:
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def close_channel(self) -> None:
        """Close the channel; a worker that still writes gets EPIPE."""
        fd, self.channel = self.channel, -1
        if fd < 0:
            return
        self._unwatch(fd)
        if self.held:
            _forking.owned.add(fd)  # somebody is writing to it, who will close it: see `let_go`
            return
        self._detach()
        os.close(fd)

    def let_go(self) -> None:
        """The thread that was about to give it a job has done so, or will not."""
        self.held = False
        if self.channel < 0 and self.sock is not None:
            fd = self.sock.detach()
            if fd >= 0:
                _forking.close(fd)

    def _detach(self) -> None:
        if self.sock is not None:
            self.sock.detach()  # the number is ours to close

    def close_pidfd(self) -> None:
        """Close the pidfd."""
        fd, self.pidfd = self.pidfd, -1
        if fd >= 0:
            self._unwatch(fd)
            os.close(fd)

    def forget(self) -> None:
        """In a forked child, where the parent's descriptors have been closed."""
        self.channel = self.pidfd = -1
        self._detach()


def child_exit_status(pidfd: int) -> Optional[int]:
    """Reap the child behind ``pidfd``; None when another part of the program reaped it first."""
    if pidfd < 0:
        return None
    try:
        # Not by pid, which may be another process by now; a pidfd is this process for ever.
        info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    except ChildProcessError:
        return None
    if info is None:
        return None
    return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status
