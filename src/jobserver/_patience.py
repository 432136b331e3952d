# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Waiting for an executor inside a job, without holding up what is waited for.

The rules are those of ``_admission``, for a job some thread of which waits without a timeout for
its executor:

* It may hold the only slot there is. So the executor's next call runs on the job's own slot if it
  finds no other; or with ``lend=True`` the slot goes into the pool for the time of the wait.
* It hears its bell: somebody below starves. Then it puts its slot into the pool or, having none,
  rings the next bell up; and it starves itself without a slot, with calls that want one, and with
  none that runs on one.
* When the wait is over the thread goes on as soon as the job holds a slot again. The slot of the
  call that was waited for comes to the job directly.

The executor's thread sees to all that, as it is the one that looks for slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Optional

from ._holding import Resting
from ._signals import deferred
from ._slots._lease import Lease
from ._slots._own import own_slot

if TYPE_CHECKING:
    from ._jobserver import Jobserver
    from ._pledge import Pledge


class Patience:
    """
    Which promises of one executor are waited for without a timeout, in a job on its slots.

    Guarded by the lock of the reactor; all but ``awaiting``, ``begin`` and ``end`` are called with
    it held.
    """

    def __init__(self, jobserver: Jobserver) -> None:
        self._lends = jobserver._lend
        self.shared = jobserver._shared
        self._counts: dict[object, int] = {}
        self._rang = False  # the bell above, and has to take it back
        self._passed_on = False  # nothing is left to do about one's own bell

    def awaiting(self, target: object, seek: Callable[[], None]) -> Wait:
        """
        Return the context in which to wait.

        Args:
            target: The promise that is waited for, or the executor.
            seek: Has the executor's thread look around anew.
        """
        return Wait(self, target, seek)

    def begin(self, target: object) -> bool:
        """Note that a thread waits for ``target``; False outside of jobs on this pool."""
        with deferred(), self.shared.reactor.lock:
            own = own_slot()
            if not own.attach(self.shared.slots):
                return False
            self._counts[target] = self._counts.get(target, 0) + 1
            job = getattr(target, "job", None)
            if job is not None:
                self.shared.reactor.claimed.add(job)
            if self._lends:
                self._put_down()
        return True

    def end(self, target: object) -> bool:
        """
        Note that a thread has stopped waiting; returns when the job holds a slot again.

        Returns:
            Whether others still wait, who may have to lend it again.
        """
        reactor = self.shared.reactor
        with deferred(), reactor.lock:
            count = self._counts.pop(target, 0) - 1
            job = getattr(target, "job", None)
            if count > 0:
                self._counts[target] = count
            elif job is not None:
                reactor.claimed.discard(job)
            if not self._counts:
                self._hush()
        self.shared.admission.regain()
        return bool(self._counts)

    def started(self, promise: Pledge) -> None:
        """A call is running now: if it is waited for, its slot is to come to this job."""
        if promise in self._counts and promise.job is not None:
            self.shared.reactor.claimed.add(promise.job)

    def ended(self, promise: Pledge) -> None:
        """A call has ended: nobody needs to wait for it any more."""
        self._counts.pop(promise, None)
        if promise.job is not None:
            self.shared.reactor.claimed.discard(promise.job)

    def lend(self) -> Optional[Lease]:
        """There is no free slot for a call: return the job's own if it may have that."""
        own = own_slot()
        if not self._counts or not own.attach(self.shared.slots):
            return None
        lease = own.lend_to_child()
        if lease is not None:
            self.shared.reactor.crew.take_for(lease)
        elif not self.shared.reactor.lends_below():
            self._ring()
        return lease

    def listen(self) -> None:
        """If somebody below starves, help or pass it on."""
        own = own_slot()
        if self._counts and own.attach(self.shared.slots) and own.heard():
            if own.lease is not None:
                self._put_down()
            else:
                self._passed_on = True
                self._ring()

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptor that is readable when ``listen`` has something to do."""
        own = own_slot()
        idle = not self._counts or (self._passed_on and own.lease is None)
        return () if idle or own.bell() < 0 else (own.bell(),)

    def _put_down(self) -> None:
        lease = own_slot().lend()
        if lease is not None:
            lease.release()

    def _ring(self) -> None:
        self._rang = self._rang or own_slot().ring()

    def _hush(self) -> None:
        self._passed_on = False
        if self._rang:
            self._rang = False
            own_slot().hush()


class Wait:
    """The time in which a thread waits."""

    def __init__(self, patience: Patience, target: object, seek: Callable[[], None]) -> None:
        self._patience = patience
        self._target = target
        self._seek = seek
        self._begun = False
        self._resting = Resting(patience.shared)

    def __enter__(self) -> None:
        self._resting.__enter__()
        self._begun = self._patience.begin(self._target)
        if self._begun:
            self._seek()

    def __exit__(self, *exc: object) -> None:
        try:
            if self._begun and self._patience.end(self._target):
                self._seek()
        finally:
            self._resting.__exit__()
