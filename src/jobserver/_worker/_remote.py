# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A worker that gets its job over its channel, from a process it was not forked from."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import signal
from functools import partial
from multiprocessing import process, resource_tracker, spawn
from typing import Any, NamedTuple, NoReturn, Optional

from jobserver._errors import Unguarded, shown
from jobserver._fds import adopt
from jobserver._slots._own import OwnSlot, run_on
from jobserver._wire import Frame

from . import _inherit
from ._main import Worker, work_once
from ._next import Next, load, receive_job
from ._process import NAME, Identity, shut_stdin
from ._protocol import unpack_head
from ._stay import Habitat, accept
from ._task import perform

# The functions below signal's, which make enums of each signal.
_SIGINT = int(signal.SIGINT)
_tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined, unused-ignore]


class Heritage(NamedTuple):
    """
    What a zygote has made ready for its workers: all that they need not make themselves, as what a
    fresh child writes to must be copied first.

    Args:
        told: Of what the zygote knew, what it leaves to them: if it could not import main for its
            threads, that.
        failure: Why it could not import the main module, if so.
        identity: Who they are.
        until_job: What handles Ctrl-C until the job is there.
    """

    told: dict[str, Any]
    failure: Optional[RuntimeError]
    identity: Identity
    until_job: Any


def main(channel: int) -> NoReturn:
    """Entry point of a spawned worker."""
    os.set_inheritable(channel, False)
    serve(channel, Heritage({}, None, Identity(0), _signal.getsignal(_SIGINT)), spawned=True)


def serve(channel: int, heritage: Heritage, *, spawned: bool) -> NoReturn:
    """
    Receive one job and run it.

    Args:
        channel: A blocking stream socket.
        heritage: What is known already.
        spawned: There is no zygote, and nobody knew whose child this is to be.
    """
    sock = adopt(channel)
    try:
        frame, fds = receive_job(sock, b"", [])
    except (EOFError, ConnectionResetError):
        os._exit(1)  # whoever wanted a job done is gone
    sock.detach()
    key, place, has_lease, has_bell, parent_pid, changed, stays = unpack_head(frame.segments[0])
    told, failure, identity, until_job = heritage
    if spawned:
        identity.set_parent(parent_pid)
    identity.assume(forked=not spawned)
    inherited, _tracker._fd = _tracker._fd, fds.pop(0)
    if inherited is not None:
        os.close(inherited)  # importing main in the zygote has opened it
    lease = fds.pop(0) if has_lease else -1
    bell = fds.pop(0) if has_bell else -1
    run_on(OwnSlot(key, lease, place, bell))
    if fds:
        _inherit.hold(fds)
    # In a list, as it is to be held only until it is unpacked.
    job = partial(
        _run_first, [frame], changed, told, failure, until_job, spawned, stays is not None
    )
    del frame
    if stays is None:
        work_once(channel, job)
    Worker(channel, Next(channel, stays, Habitat({}, ""), place, bell)).work(job)


def _run_first(
    held: list[Frame],
    changed: dict[str, Any],
    told: dict[str, Any],
    failure: Optional[RuntimeError],
    until_job: Any,
    spawned: bool,
    stays: bool,
) -> Any:
    try:
        if failure is not None:
            raise failure
        if changed or told:
            _prepare(changed, told)
        if spawned:
            shut_stdin()
        if stays:
            accept()
        task = load(held.pop())
    finally:
        # Unless importing main has chosen another handler, or it is ignored.
        if callable(until_job) and _signal.getsignal(_SIGINT) is until_job:
            _signal.signal(_SIGINT, _signal.default_int_handler)
    return perform(*task)


def _prepare(changed: dict[str, Any], told: dict[str, Any]) -> None:
    """Make this process like the one that has submitted the job."""
    if "environ" in changed:
        os.environ.clear()
        os.environ.update(changed["environ"])
    state: Any = process.current_process()
    state._inheriting = True
    try:
        spawn.prepare({**changed, **told, "name": NAME})  # type: ignore[attr-defined, unused-ignore]
    except Unguarded:
        raise
    except BaseException as error:
        raise RuntimeError(f"the worker could not be prepared: {shown(error)}") from error
    finally:
        del state._inheriting
