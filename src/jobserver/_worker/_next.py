# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Where a worker that stays gets its next job from."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import pickle
import select
import signal
import socket
import struct
from functools import partial
from multiprocessing import process
from typing import Any, Callable, NoReturn, Optional

from jobserver._errors import Untransferable, shown
from jobserver._fds import CLOEXEC, MOST, adopt, fds_of, refuse_truncated
from jobserver._reader import FrameReader
from jobserver._slots._own import own_slot, run_on
from jobserver._spin import Spin
from jobserver._wire import Frame, brief, small_job

from . import _inherit
from ._process import finish_process
from ._stay import Habitat, Stays, inhabit
from ._task import perform

# The functions below signal's, which make enums of each signal.
_CTRL_C = (int(signal.SIGINT),)
_COUNT = struct.Struct("<I")
_SIZE = 1 << 16
_SPACE = socket.CMSG_SPACE(MOST * 4)


class Next:
    """
    The way further jobs come.

    Args:
        channel: A blocking stream socket.
        stays: How long this worker may stay.
        habitat: What jobs are to find here.
        place: The section and the berth of the lease that the worker has.
        bell: The descriptor of the bell, -1 for none.
    """

    def __init__(
        self,
        channel: int,
        stays: Stays,
        habitat: Habitat,
        place: Optional[tuple[int, int]],
        bell: int,
    ) -> None:
        self._channel = channel
        self._left = stays.tasks
        self._idle = stays.idle
        self._habitat = habitat
        self._place = place
        self._bell = bell
        self._lease = -1
        self.sock: Optional[socket.socket] = None
        self._look: Callable[[], Any]  # whether something has come; these two come with the socket
        self._sleep: Callable[[], Any]
        self._quiet = _Quiet()
        self._spin = Spin()
        # What has come and has not been run: of a small job the pickled task, else the frame.
        self._small: Optional[bytes] = None
        self._frame: Optional[Frame] = None
        self._told: dict[str, Any] = {}

    def begin(self) -> None:
        """In the worker, before its first job."""
        inhabit(self._habitat)

    def tidy(self) -> bool:
        """After a job: say whether there may be another one here."""
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                return False
        return self._habitat.tidy()

    def ready(self) -> None:
        """Leave the seat of the job that has ended; the answer may now be sent."""
        self._quiet.begin()
        self._lease = own_slot().leave()
        if self.sock is None:
            self.sock = adopt(self._channel)
            poller = select.poll()
            poller.register(self._channel, select.POLLIN)
            self._look = partial(poller.poll, 0)
            self._sleep = partial(_read_once, self.sock, _SIZE)
            # So that waiting for too long costs no system call more than waiting.
            limit = struct.pack("ll", int(self._idle), int(self._idle % 1 * 1e6))
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def job(self) -> Callable[[], Any]:
        """Wait for the next job; ends the process when there will be none."""
        sock, own = self.sock, own_slot()
        assert sock is not None  # noqa: S101  # made by `ready`
        frame = None
        try:
            data, fds = self._hear(sock)
            # Nearly all come so: small, and with nothing told about them.
            self._small = None if fds else small_job(data)
            if self._small is None:
                frame, fds = receive_job(sock, data, fds)
        except (EOFError, ConnectionResetError):
            self._end()
        if frame is None:
            if _inherit._received:
                _inherit.hold([])
            if not own.is_just(self._lease, self._place, self._bell):
                run_on(own.successor(self._lease, self._place, self._bell))
            return self._run_small
        self._frame = frame
        told: dict[str, Any] = pickle.loads(frame.segments[0]) if frame.segments[0] else {}  # noqa: S301
        if "place" in told:
            self._place = told["place"]
            self._lease = _exchange(self._lease, fds.pop(0))
        if "bell" in told:
            self._bell = _exchange(self._bell, fds.pop(0))
        run_on(own.successor(self._lease, self._place, self._bell))
        _inherit.hold(fds)
        self._told = told
        return self._run

    # What is run refers to what it came in only until that has been unpacked.

    def _run_small(self) -> Any:
        small, self._small = self._small, None
        assert small is not None  # noqa: S101  # run once
        self._quiet.end()
        try:
            task = pickle.loads(small)  # noqa: S301
        except Exception as error:
            raise _refusal(error) from error
        del small
        return perform(*task)

    def _run(self) -> Any:
        frame, self._frame = self._frame, None
        assert frame is not None  # noqa: S101  # run once
        self._quiet.end()
        if self._told:
            self._habitat.change(self._told)
        task = load(frame)
        del frame
        return perform(*task)

    def _hear(self, sock: socket.socket) -> tuple[bytes, list[int]]:
        """Wait for the first part of a job."""
        try:
            heard: Any = self._spin.wait(self._look, self._sleep)
            return heard if type(heard) is tuple else _read_once(sock, _SIZE)
        except BlockingIOError:
            # It has been long. From here on nobody can send us anything; what was sent before is
            # still to be heard, and the last job then.
            sock.shutdown(socket.SHUT_RD)
            self._left = 1
            return _read_once(sock, _SIZE)

    def _end(self) -> NoReturn:
        try:
            self._quiet.end()
            finish_process()
        finally:
            os._exit(0)


class _Quiet:
    """
    At rest a worker is deaf to Ctrl-C.

    That is for the program, which may go on and submit a job at once. So what has come by the time
    that a job is here is forgotten, unless the owner has sent it: then it is meant for that job.
    """

    def __init__(self) -> None:
        self._mask: Any = None

    def begin(self) -> None:
        """From here on Ctrl-C is not heard."""
        self._mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, _CTRL_C)

    def end(self) -> None:
        """From here on it is; raises KeyboardInterrupt if it was meant for the job."""
        info = _signal.sigtimedwait(_CTRL_C, 0)
        if info is not None:
            parent = process.parent_process()
            if parent is not None and info.si_pid == parent.pid:
                os.kill(os.getpid(), signal.SIGINT)
        _signal.pthread_sigmask(_signal.SIG_SETMASK, self._mask)


def receive_job(sock: socket.socket, data: bytes, fds: list[int]) -> tuple[Frame, list[int]]:
    """
    Receive a job and its descriptors, on a blocking stream; all of these close-on-exec.

    Args:
        sock: Where the rest comes from.
        data: What has been heard of it; there may be nothing yet.
        fds: The descriptors that came with that.

    Raises:
        EOFError, ConnectionResetError: Nothing more comes.
    """
    while len(data) < _COUNT.size:
        # Beside the rest of a count that has come in parts there may be the bytes of descriptors.
        more, others = _read(sock, _COUNT.size - len(data) if data else _SIZE)
        data += more
        fds += others
    (count,) = _COUNT.unpack_from(data)
    while len(fds) < count:
        fds += _read(sock, 1)[1]
    found = brief(data, _COUNT.size)
    if found is not None:
        return found, fds
    reader = FrameReader(fds)
    frame = reader.push(data[_COUNT.size :])
    while frame is None:
        frame = reader.feed(sock.fileno())
    return frame, fds


def load(frame: Frame) -> tuple[Any, ...]:
    """Unpickle a task."""
    try:
        return frame.load()  # type: ignore[no-any-return]
    except Exception as error:
        raise _refusal(error) from error


def _refusal(error: Exception) -> Untransferable:
    return Untransferable(f"the job could not be unpickled in the worker: {shown(error)}")


def _read(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Read what must come, however long it takes."""
    while True:
        try:
            return _read_once(sock, size)
        except BlockingIOError:
            continue


def _read_once(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    data, ancillary, flags, _address = sock.recvmsg(size, _SPACE, CLOEXEC)
    if flags != CLOEXEC:  # which comes back, with what else is to be told
        refuse_truncated(flags)
    if not data:
        raise EOFError
    return data, fds_of(ancillary) if ancillary else []


def _exchange(old: int, new: int) -> int:
    if old >= 0:
        os.close(old)
    return new
