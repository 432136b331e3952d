# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A worker in flight: its process, its channel, the job that it runs, and that job's slot."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, Callable, Optional

from . import _forking
from ._errors import SubmissionDied
from ._reader import FIRST_READ, FrameReader
from ._slots._lease import Lease
from ._wire import STAYS, Corrupt, Frame, brief

if TYPE_CHECKING:
    from ._future import Future
    from ._poller import Poller


class Flight:
    """
    One worker, until its process is reaped, and the job that it runs, until that is answered.

    The reactor calls ``on_channel`` and ``on_exit`` under its lock; neither blocks. A worker that
    stays is between jobs in the reactor's crew, or in the hand of a thread that gives it a job.

    Args:
        pid: Its process.
        pidfd: The same; readable once the process has ended, -1 if other code has reaped it.
        channel: Non-blocking, carries the answer, and ends when the worker ends.
        exit_status: Given the pidfd, and whether it is of interest, tells the exit code once the
            process has ended; None when nobody knows.
        sock: The channel, if it is a socket.
        told: What a worker that may be given more jobs knows of this process's surroundings; None
            for one that ends with its first job.
        bell: The bell it was born with.
        first: What it has run before its first job.
        born: Its number among the forked ones.
    """

    __slots__ = (
        "_exit_status",
        "_heard",
        "_reader",
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
        "poller",
        "seat",
        "signalled",
        "sock",
        "told",
    )

    def __init__(
        self,
        pid: int,
        pidfd: int,
        channel: int,
        exit_status: Callable[[int, bool], Optional[int]],
        sock: Optional[socket.socket] = None,
        told: Optional[dict[str, Any]] = None,
        bell: int = -1,
        first: Optional[object] = None,
        born: int = 0,
    ) -> None:
        self.future: Optional[Future[Any]] = None  # from when it is tracked until its outcome
        self.lease: Optional[Lease] = None
        self.poller: Optional[Poller] = None  # which watches it
        self.sock: Optional[socket.socket] = sock
        # Of a worker that may stay: its seat, between jobs; the lease whose description it shares;
        # and what else it has been told or given.
        self.seat: Optional[Lease] = None
        self.known: Optional[Lease] = None
        self.told: Optional[dict[str, Any]] = told
        self.bell: int = bell
        self.first: Optional[object] = first
        self.born: int = born
        self.held: bool = False  # a thread of ours is about to give it a job
        self.signalled: bool = False  # a signal may still be on its way to the process
        self.lingers: bool = False  # it is to end, and nobody waits for anything else from it
        self.pid: int = pid
        self.pidfd: int = pidfd
        self.channel: int = channel
        self.frame: Optional[Frame] = None
        self.exitcode: Optional[int] = None
        self.exited: bool = False
        self.detail: str = ""
        self._exit_status = exit_status
        self._heard = 0  # bytes on the channel
        self._reader: Optional[FrameReader] = None  # for an answer that comes in several pieces

    def on_channel(self) -> None:
        """Read from the channel. End-of-file alone is no death: the job may have closed it."""
        if self.frame is not None:
            return  # old news: another thread has read the answer, and nothing follows one
        frame = None
        try:
            if self._reader is None:
                # Nearly all answers come in one piece.
                data = os.read(self.channel, FIRST_READ)
                self._heard += len(data)
                frame = brief(data, 0)
                if frame is None:
                    frame = self._read_on(data)
            else:
                frame = self._read_on(b"")
        except BlockingIOError:
            return
        except (EOFError, ConnectionResetError):
            self.close_channel()
            if self.pidfd < 0:
                self.on_exit()
            return
        except Corrupt as error:
            self.detail = f"its channel was garbled ({error})"
            self.close_channel()
            return
        self.frame = frame
        if frame is not None and (self.sock is None or not frame.flags & STAYS):
            self.close_channel()

    def _read_on(self, data: bytes) -> Optional[Frame]:
        reader = self._reader
        if reader is None:
            if not data:
                raise EOFError
            reader = self._reader = FrameReader()
            frame = reader.push(data)
        else:
            frame = None
        if frame is None:
            before = reader.progress
            try:
                frame = reader.feed(self.channel)
            finally:
                self._heard += reader.progress - before
        if frame is not None:
            self._reader = None
        return frame

    def on_exit(self) -> None:
        """The process has ended: what is still in the channel is all that will ever come."""
        while self.channel >= 0 and self.frame is None:
            before = self._heard
            self.on_channel()
            if self._heard == before:
                break
        self.exited = True
        self.exitcode = self._exit_status(self.pidfd, self.future is not None and not self.frame)
        if self.channel >= 0:
            self.close_channel()
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            if self.poller is not None:
                self.poller.unwatch(pidfd)
            os.close(pidfd)

    def death(self) -> SubmissionDied:
        """Return the exception that tells how the worker ended."""
        return SubmissionDied(self.exitcode, self.detail)

    def kill(self) -> None:
        """End a worker that nobody will track, and close what belongs to it."""
        self._detach()
        _forking.close(self.channel)
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):  # ended, and reaped by the zygote
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            self._exit_status(self.pidfd, True)
            os.close(self.pidfd)

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
        if self.poller is not None:
            self.poller.unwatch(fd)
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

    def forget(self) -> None:
        """In a forked child, where the parent's descriptors have been closed."""
        self.channel = self.pidfd = -1
        self._detach()


def child_exit_status(pidfd: int, _asked: bool) -> Optional[int]:
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
