# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A job in flight: its process, its channel, its slot."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

from . import _forking
from ._errors import SubmissionDied
from ._slots._lease import Lease
from ._wire import Corrupt, Frame, FrameReader

if TYPE_CHECKING:
    from ._future import Future


class Started(NamedTuple):
    """
    What a launcher returns.

    ``pidfd`` is -1 where the process was reaped by somebody else before it could be opened;
    ``exit_status`` tells the exit code once the process has ended, None when nobody knows.
    """

    pid: int
    pidfd: int
    channel: int
    exit_status: Callable[[], Optional[int]]

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
    One running worker, until its answer or its death is known, and its process reaped.

    The reactor calls ``on_channel`` and ``on_exit`` under its lock; neither blocks.
    """

    __slots__ = (
        "_reader",
        "_started",
        "_unwatch",
        "channel",
        "detail",
        "exitcode",
        "exited",
        "frame",
        "future",
        "lease",
        "pid",
        "pidfd",
    )

    def __init__(
        self,
        started: Started,
        lease: Optional[Lease],
        unwatch: Callable[[int], None],
        future: Future[Any],
    ) -> None:
        self.future: Optional[Future[Any]] = future  # until it has its outcome
        self._unwatch = unwatch
        self.pid = started.pid
        self.pidfd = started.pidfd
        self.channel = started.channel
        self.lease = lease
        self.frame: Optional[Frame] = None
        self.exitcode: Optional[int] = None
        self.exited = False
        self.detail = ""
        self._started = started
        self._reader = FrameReader()

    @property
    def settled(self) -> bool:
        """Whether it is known how the job ended."""
        return self.frame is not None or self.exited

    def on_channel(self) -> None:
        """Read from the channel. End-of-file alone is no death: the job may have closed it."""
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
        if self.frame is not None:
            self.close_channel()

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
        if fd >= 0:
            self._unwatch(fd)
            os.close(fd)

    def close_pidfd(self) -> None:
        """Close the pidfd."""
        fd, self.pidfd = self.pidfd, -1
        if fd >= 0:
            self._unwatch(fd)
            os.close(fd)

    def forget(self) -> None:
        """In a forked child, where the parent's descriptors have been closed."""
        self.channel = self.pidfd = -1


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
