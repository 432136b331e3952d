# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Send a job to a worker that has run others."""

from __future__ import annotations

import pickle
from typing import Any

from jobserver._fds import send_job, send_small_job
from jobserver._flight import Flight
from jobserver._signals import lifted
from jobserver._slots._lease import Lease
from jobserver._wire import ASIDE, TASK, encode

from ._pickling import Pickled
from ._prep import changes


def hand_over_plain(
    pickled: bytes, surroundings: dict[str, Any], lease: Lease, bell: int, worker: Flight
) -> bool:
    """Send a small task, whose pickle is all there is of it; see ``hand_over``."""
    if worker.known is lease and worker.bell == bell and worker.told is surroundings:
        assert worker.sock is not None  # noqa: S101  # it is one that stays
        try:
            send_small_job(worker.sock, pickled)
        except OSError:
            return False
        return True
    return _hand_over(Pickled([pickled], []), surroundings, lease, bell, worker)


def hand_over(
    pickled: Pickled, surroundings: dict[str, Any], lease: Lease, bell: int, worker: Flight
) -> bool:
    """
    Send it. The caller has signals wait, which are let through, as it may take its time.

    Args:
        pickled: The task.
        surroundings: What the worker is to find around it.
        lease: What the job runs on.
        bell: What it is to ring, -1 for nothing.
        worker: Who is to run it; it knows what it was told before.

    Returns:
        False if the worker has gone before it had heard all: so it has run nothing of it.
    """
    with lifted():
        return _hand_over(pickled, surroundings, lease, bell, worker)


def _hand_over(
    pickled: Pickled, surroundings: dict[str, Any], lease: Lease, bell: int, worker: Flight
) -> bool:
    text, fds = b"", pickled.fds
    known, fresh = worker.told, worker.known is not lease
    if fresh or bell != worker.bell or known is not surroundings:
        told: dict[str, Any] = {}
        ahead: list[int] = []
        if known is not None and known is not surroundings:
            told = changes(surroundings, known)
            if "environ" in told:
                told["environ"] = _encoded(told["environ"])
        if fresh:
            told["place"] = lease.place
            ahead.append(lease.fileno())
        if bell != worker.bell:
            told["bell"] = True
            ahead.append(bell)
        text, fds = pickle.dumps(told), [*ahead, *fds]
    assert worker.sock is not None  # noqa: S101  # it is one that stays
    try:
        send_job(worker.sock, fds, encode(TASK, text, pickled.payload, lend=ASIDE))
    except OSError:
        return False
    worker.told, worker.bell = surroundings, bell
    return True


def _encoded(environ: dict[str, str]) -> dict[bytes, bytes]:
    return {
        name.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for name, value in environ.items()
    }
