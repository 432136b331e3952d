# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Waiting for an executor inside a job, without holding up what is waited for.

The job may hold the only slot there is. So while a thread of it waits without a timeout, the
executor may run its next call on the job's own slot, and the thread goes on when the job holds a
slot again. With ``lend=True`` the slot goes into the pool for the time of the wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Optional

from ._slots._lease import Lease
from ._slots._own import own_slot

if TYPE_CHECKING:
    from ._jobserver import Jobserver
    from ._promise import Promise


class Patience:
    """
    Which promises of one executor are waited for without a timeout, in a job on its slots.

    Methods that say so are called with the lock of the reactor held.

    Args:
        jobserver: The one that the executor runs on.
    """

    def __init__(self, jobserver: Jobserver) -> None:
        self.jobserver = jobserver
        self.shared = jobserver._shared
        self._counts: dict[object, int] = {}

    def awaiting(self, target: object, seek: Callable[[], bool]) -> _Wait:
        """
        Return the context in which to wait.

        Args:
            target: The promise that is waited for, or the executor.
            seek: Has the executor look for a slot anew; says whether any call wants one.
        """
        return _Wait(self, target, seek)

    def lend(self) -> Optional[Lease]:
        """Take the job's own slot if somebody waits; call with the lock held."""
        own = own_slot()
        return own.lend() if self._counts and own.attach(self.shared.slots) else None

    def started(self, promise: Promise[Any]) -> None:
        """Have the slot of a running call come to this job if it is waited for; with the lock."""
        if promise in self._counts and promise.job is not None:
            self.shared.reactor.claimed.add(promise.job)

    def ended(self, promise: Promise[Any]) -> None:
        """Nobody needs to wait for ``promise`` any more; call with the lock held."""
        self._counts.pop(promise, None)
        if promise.job is not None:
            self.shared.reactor.claimed.discard(promise.job)

    def begin(self, target: object) -> bool:
        """Note that a thread waits for ``target``; False where there is no slot to lend."""
        with self.shared.reactor.lock:
            own = own_slot()
            if not own.attach(self.shared.slots):
                return False
            self._counts[target] = self._counts.get(target, 0) + 1
            job = getattr(target, "job", None)
            if job is not None:
                self.shared.reactor.claimed.add(job)
            lease = own.lend() if self.jobserver._lend else None
            if lease is not None:
                lease.release()
        return True

    def end(self, target: object) -> None:
        """Note that a thread has stopped waiting; returns when the job holds a slot again."""
        with self.shared.reactor.lock:
            count = self._counts.pop(target, 0) - 1
            if count > 0:
                self._counts[target] = count
            job = getattr(target, "job", None)
            if job is not None and count <= 0:
                self.shared.reactor.claimed.discard(job)
        self.shared.admission.regain()


class _Wait:
    """The time in which a thread waits."""

    def __init__(self, patience: Patience, target: object, seek: Callable[[], bool]) -> None:
        self._patience = patience
        self._target = target
        self._seek = seek
        self._begun = self._rang = False

    def __enter__(self) -> None:
        self._begun = self._patience.begin(self._target)
        if self._begun and self._seek():
            # A job without a slot asks those above it, who may be waiting with one.
            self._rang = own_slot().ring()

    def __exit__(self, *exc: object) -> None:
        if self._rang:
            own_slot().hush()
        if self._begun:
            self._patience.end(self._target)
