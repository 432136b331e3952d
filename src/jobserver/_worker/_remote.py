# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A worker that gets its job over its channel, from a process it was not forked from."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import pickle
import signal
from multiprocessing import process, resource_tracker, spawn
from typing import Any, NamedTuple, NoReturn, Optional

from jobserver._errors import Unguarded, shown
from jobserver._fds import adopt
from jobserver._reader import FrameReader
from jobserver._slots._own import OwnSlot, run_on
from jobserver._wire import Frame

from . import _inherit
from ._main import Worker
from ._next import Next, load, receive_job
from ._process import NAME, Identity, shut_stdin
from ._stay import Habitat, Stays

# The functions below signal's, which make enums of each signal.
_SIGINT = int(signal.SIGINT)


class Heritage(NamedTuple):
    """
    What a zygote has made ready for its workers: all that they need not make themselves, as what a
    fresh child writes to must be copied first.

    Args:
        told: What the zygote knew.
        failure: Why it could not import the main module, if so.
        identity: Who they are.
    """

    told: dict[str, Any]
    failure: Optional[RuntimeError]
    identity: Identity


def main(channel: int) -> NoReturn:
    """Entry point of a spawned worker."""
    os.set_inheritable(channel, False)
    serve(channel, None)


def serve(channel: int, heritage: Optional[Heritage]) -> NoReturn:
    """
    Receive one job and run it.

    Args:
        channel: A blocking stream socket.
        heritage: None without a zygote.
    """
    until_job = _signal.getsignal(_SIGINT)
    sock = adopt(channel)
    try:
        frame, fds = receive_job(sock, b"", [], FrameReader())
    except (EOFError, ConnectionResetError):
        os._exit(1)  # whoever wanted a job done is gone
    sock.detach()
    changed = pickle.loads(frame.segments[0])  # noqa: S301
    told, failure, identity = heritage or ({}, None, Identity(0))
    identity.assume(forked=heritage is not None, parent_pid=changed["parent_pid"])
    tracker: Any = resource_tracker
    tracker._resource_tracker._fd = fds.pop(0)
    key, has_lease, place, has_bell = changed["seat"]
    lease = fds.pop(0) if has_lease else -1
    bell = fds.pop(0) if has_bell else -1
    run_on(OwnSlot(key, lease, place, bell))
    _inherit.hold(fds)
    stays: Optional[Stays] = changed["stays"]
    habitat = Habitat({}, "")
    next_jobs = None if stays is None else Next(channel, stays, habitat, place, bell)
    task = _Held(frame)
    del frame

    def call() -> Any:
        try:
            if failure is not None:
                raise failure
            _prepare(changed, told)
            if heritage is None:
                shut_stdin()
            if stays is not None:
                habitat.accept()
            job = load(task.take())
        finally:
            # Unless importing main has chosen another handler, or it is ignored.
            if callable(until_job) and _signal.getsignal(_SIGINT) is until_job:
                _signal.signal(_SIGINT, _signal.default_int_handler)
        return job.run()

    Worker(channel, next_jobs).work(call)


class _Held:
    """Refers to a frame until it is taken out."""

    def __init__(self, frame: Frame) -> None:
        self._frame: Optional[Frame] = frame

    def take(self) -> Frame:
        frame, self._frame = self._frame, None
        assert frame is not None  # noqa: S101  # taken once
        return frame


def _prepare(changed: dict[str, Any], told: dict[str, Any]) -> None:
    """Make this process like the one that has submitted the job."""
    if "environ" in changed:
        os.environ.clear()
        os.environ.update(changed["environ"])
    state: Any = process.current_process()
    state._inheriting = True
    try:
        # A zygote that could not import main for its threads leaves that to us.
        main = {key: value for key, value in told.items() if key.startswith("init_main")}
        spawn.prepare({**changed, **main, "name": NAME})  # type: ignore[attr-defined, unused-ignore]
    except Unguarded:
        raise
    except BaseException as error:
        raise RuntimeError(f"the worker could not be prepared: {shown(error)}") from error
    finally:
        del state._inheriting
