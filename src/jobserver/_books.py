# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What is in flight in this process on one pool: jobs, their workers and their slots.

Guarantees:

* A future's outcome is set once, under ``lock``, after its slot has gone back.
* A thread that settles something while another leads nudges the leader, which polls for events
  that have already been taken.
* No code of the user runs under ``lock``: results are unpickled and callbacks issued elsewhere.

Who waits for news of them, and brings it here, is the ``Reactor``.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Optional

from ._crew import Crew
from ._flight import Flight
from ._outcome import Outcome
from ._poller import Poller
from ._signals import deferred
from ._sleeper import Sleeper
from ._slots._lease import Lease
from ._slots._own import own_slot
from ._slots._pool import SlotPool
from ._wire import RETURNED, STAYS, Frame

if TYPE_CHECKING:
    from ._future import Future

# Those with jobs in flight, so that the end of the process can wait for them all.
active: set[Any] = set()


class Books:
    """The jobs that this process has submitted to ``slots``."""

    def __init__(self, slots: SlotPool, crew: Crew) -> None:
        self.slots = slots
        self.crew = crew
        # Reentrant, as a signal handler may call us wherever it interrupts its thread.
        self.lock: Any = threading.RLock()
        # Futures whose callbacks are due, oldest first.
        self.ready: deque[Future[Any]] = deque()
        # Futures that this job, having lent its slot, waits for: it goes on with their slot.
        self.claimed: set[Future[Any]] = set()
        # Threads that wait for this job's own slot to come back from anywhere.
        self.starving: int = 0
        self.closed: bool = False
        self._dropped = False  # there is no handle any more that could submit
        self.running: dict[Future[Any], Flight] = {}
        self.poller: Poller = Poller()
        self._lingering = 0  # workers that have answered and are not reaped yet
        self._leading = 0  # the thread that polls for all; 0 for none
        self._followers: dict[Sleeper, None] = {}

    def add(self, future: Future[Any], flight: Flight, lease: Optional[Lease]) -> None:
        """Track a job that has just been started. The caller has signals wait."""
        with self.lock:
            self.poller.watch(flight)
            flight.future, flight.lease = future, lease
            if flight.sock is not None:
                flight.known = lease
            self.running[future] = flight
            active.add(self)

    def assign(self, future: Future[Any], flight: Flight, lease: Lease) -> None:
        """
        Track a job that has been sent to a worker that had run others; it may have ended.

        The caller has signals wait.
        """
        with self.lock:
            lease.worker = None
            flight.held = False
            if flight.channel < 0:
                flight.let_go()
            seat, flight.seat, flight.known = flight.seat, None, lease
            if seat is not None and seat is not lease:
                seat.release()
            flight.future = future
            flight.lease = lease
            self.running[future] = flight
            if flight.frame is not None or flight.exited:
                self._settle(future, flight)
                self.crew.unload()  # nobody need look here again before code of the user's runs
                self.wake_seekers()
                self._nudge_leader()

    def dismiss(self, lease: Lease) -> None:
        """Let the worker end that was in the hand of this thread, with ``lease``."""
        with deferred(), self.lock:
            flight, lease.worker = lease.worker, None
            if flight is not None:
                flight.let_go()
                if flight.seat is lease:
                    flight.seat = None
                self.crew.unseat(flight)
                self._dismiss(flight)

    def _dismiss(self, flight: Flight) -> None:
        flight.close_channel()
        if flight.pidfd >= 0 and not flight.lingers:
            flight.lingers = True
            self._lingering += 1

    def put_back(self, lease: Lease) -> None:
        """Let the worker rest again that was in the hand of this thread, with ``lease``."""
        with deferred(), self.lock:
            flight, lease.worker = lease.worker, None
            flight.let_go()
            gone = flight.channel < 0 or flight.exited or self.closed
            if gone or not self.crew.rest(flight, lease):
                lease.release()
                self._dismiss(flight)
            self.crew.unload()
            self.wake_seekers()

    def dissolve(self) -> None:
        """Let all workers at rest end."""
        with deferred(), self.lock:
            self._dissolve()

    def unload(self) -> None:
        """Put back the tokens that workers at rest still have."""
        crew = self.crew
        if crew.loaded:
            with deferred(), self.lock:
                crew.unload()

    def _dissolve(self) -> None:
        for flight in self.crew.dissolve():
            self._dismiss(flight)

    def _forget_all(self) -> None:
        self.poller.forget()
        for future in self.running:
            future._foreign = True
        self.crew.forget()
        self.lock = threading.RLock()
        self.ready = deque()
        self.claimed = set()
        self.starving = 0
        self.running = {}
        self._lingering = 0
        self._leading = 0
        self._followers = {}

    def _prepare_nudge(self) -> None:
        if self._leading:
            self.poller.prepare_nudge()

    def _nudge_leader(self) -> None:
        if self._leading:
            self.poller.prepare_nudge()
            self.poller.nudge()

    def _settle(self, future: Future[Any], flight: Flight) -> None:
        flight.future = None
        del self.running[future]
        lease, flight.lease = flight.lease, None
        frame, flight.frame = flight.frame, None
        gone = flight.exited or flight.signalled or self.closed or self._dropped
        if lease is not None and (frame is None or frame.flags & RETURNED or own_slot().consumes):
            lease = self._slot_back(future, frame, lease)
        stays = frame is not None and frame.flags & STAYS and flight.sock is not None
        if gone or not stays or not self.crew.rest(flight, lease):
            if lease is not None:
                lease.release()
            self._dismiss(flight)
        death = flight.death() if frame is None else None
        future._outcome = Outcome(frame, death)
        if future._callbacks:
            self.ready.append(future)
        if future._sink is not None:
            future._sink.append(future)
        for sleeper in self._followers:
            target = sleeper.target
            # Callbacks are for anybody who waits: the leader may be where it must issue none.
            if future._callbacks or target is None or target is future or target is future._sink:
                sleeper.wake()

    def _slot_back(
        self, future: Future[Any], frame: Optional[Frame], lease: Lease
    ) -> Optional[Lease]:
        """Return the lease if its token is there, and nobody here waits for it."""
        own = own_slot()
        mine = lease.reclaim() if frame is None else not frame.flags & RETURNED
        if not mine:
            lease.abandon()
        elif own.lent and own.attach(self.slots) and self._wanted(future):
            own.lease = lease
            self.wake_seekers()
        else:
            return lease
        return None

    def lends_below(self) -> bool:
        """Say whether a child runs on a slot, which it will bring back."""
        return any(flight.lease is not None for flight in self.running.values())

    def _wanted(self, future: Future[Any]) -> bool:
        # Callbacks are this job's own work, for which it must hold a slot.
        return bool(self.starving or future in self.claimed or future._callbacks)

    def wake_seekers(self) -> None:
        """Let every follower that seeks a slot test again."""
        for sleeper in self._followers:
            if sleeper.seeks:
                sleeper.wake()
