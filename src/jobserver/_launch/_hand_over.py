# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Send a job to a worker that has run others."""

from __future__ import annotations

import pickle
from typing import Any

from jobserver._fds import send_job
from jobserver._flight import Flight
from jobserver._wire import ASIDE, TASK, encode

from ._pickling import Pickled
from ._prep import changes
from ._seat import Seat


def hand_over(
    pickled: Pickled, surroundings: dict[str, Any], seat: Seat, worker: Flight, *, fresh: bool
) -> bool:
    """
    Send it.

    Args:
        pickled: The task.
        surroundings: What the worker is to find around it.
        seat: What the job sits on.
        worker: Who is to run it; it knows what it was told before.
        fresh: The worker does not know the lease yet.

    Returns:
        False if the worker has gone before it had heard all: so it has run nothing of it.
    """
    text, fds = b"", pickled.fds
    known = worker.told
    if fresh or seat.bell != worker.bell or known is not surroundings:
        told: dict[str, Any] = {}
        ahead: list[int] = []
        if known is not None and known is not surroundings:
            told = changes(surroundings, known)
            if "environ" in told:
                told["environ"] = _encoded(told["environ"])
        if fresh:
            told["place"] = seat.place
            ahead.append(seat.lease_fd)
        if seat.bell != worker.bell:
            told["bell"] = True
            ahead.append(seat.bell)
        text, fds = pickle.dumps(told), [*ahead, *fds]
    assert worker.sock is not None  # noqa: S101  # it is one that stays
    try:
        send_job(worker.sock, fds, encode(TASK, text, pickled.payload, lend=ASIDE))
    except OSError:
        return False
    worker.told, worker.bell = surroundings, seat.bell
    return True


def _encoded(environ: dict[str, str]) -> dict[bytes, bytes]:
    return {
        name.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape")
        for name, value in environ.items()
    }
