# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What all handles on one pool share in one process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import warnings
import weakref
from collections import deque
from multiprocessing.context import BaseContext, get_spawning_popen
from signal import SIGKILL
from typing import Any, Callable, Optional, Union

from . import _forking
from ._admission import Admission
from ._callbacks import issuing
from ._check import check_slots, check_tasks
from ._crew import Crew
from ._ending import warn_suppressed
from ._errors import CallbackRaised
from ._future import Future
from ._launch import Launcher, launcher_for
from ._launch._pickling import is_plain
from ._reactor import Reactor, active_reactors
from ._signals import deferred
from ._slots._held import current_slot
from ._slots._lease import Lease
from ._slots._makeflags import outer_from
from ._slots._own import own_slot
from ._slots._pool import SlotPool
from ._worker._stay import IDLE, Stays
from ._worker._task import Task
from .makeflags import NoPoolOffered, PoolUnusable

# How long closing waits for processes that have answered to be gone: they end by themselves.
_LINGER = 5.0

Context = Union[None, str, BaseContext]

_by_key: weakref.WeakValueDictionary[tuple[int, int], Shared] = weakref.WeakValueDictionary()


class Shared:
    """Slots, what is in flight on them, and how to start more; one for each pool and process."""

    def __init__(self, slots: SlotPool, context: BaseContext, tasks: Optional[int]) -> None:
        self.slots = slots
        self.context = context
        self.tasks = tasks
        self.method: str = context.get_start_method()
        self.launcher: Launcher = launcher_for(self.method, slots.key)
        self.reactor = Reactor(slots, Crew(slots, tasks))
        self.admission = Admission(self.reactor)
        self._canary: Optional[weakref.ref[Canary]] = None
        self._entered = 0
        self._lock = threading.RLock()
        _by_key[slots.key] = self
        _forking.track(self, at_leisure=True)

    @classmethod
    def create(cls, context: Context, slots: Optional[int], tasks: Optional[int]) -> Shared:
        """Make a pool of its own, or join the outer make's."""
        found = _prepared(context)
        if slots is not None:
            check_slots(slots)
        check_tasks(tasks)
        warm = tasks != 1
        with deferred():  # else descriptors might be opened and not noted
            pool = default_pool(warm=warm) if slots is None else SlotPool.create(slots, warm=warm)
        return cls(pool, found, tasks)

    @classmethod
    def join(cls, context: Context, tasks: Optional[int]) -> Shared:
        """Join the outer make's pool, and no other."""
        found = _prepared(context)
        check_tasks(tasks)
        return cls(SlotPool.join(outer_from(os.environ), warm=tasks != 1), found, tasks)

    @property
    def closed(self) -> bool:
        """Whether work is refused."""
        return self.reactor.closed

    def canary(self) -> Canary:
        """Return the object whose end is that of the last handle."""
        canary = None if self._canary is None else self._canary()
        if canary is None:
            canary = Canary(self)
            self.reactor.revive()
            self._canary = weakref.ref(canary)
        return canary

    def refuse_closed(self) -> None:
        """Raise RuntimeError if closed."""
        if _forking._stale:
            _forking.settle()
        if self.reactor.closed:
            raise RuntimeError("Jobserver is closed")

    def enter(self) -> None:
        """Open a with-block."""
        with deferred(), self._lock:
            self.refuse_closed()
            self._entered += 1

    def exit(self) -> None:
        """Leave a with-block: reap, and drain the callbacks; after the last one, close."""
        _forking.settle()
        with deferred(), self._lock:
            entered = self._entered
            self._entered = max(0, entered - 1)
        if not entered:
            return
        try:
            self.drain_callbacks()
        finally:
            # Also where a callback has raised KeyboardInterrupt, or where warnings are errors.
            if entered == 1:
                self.reactor.dissolve()
                self.reactor.reap_lingering(_LINGER)
                self.reactor.close()

    def drain_callbacks(self) -> None:
        """Reap without waiting, and issue all callbacks; errors in them become warnings."""
        while True:
            try:
                self.admission.reap()
            except CallbackRaised as raised:
                warn_suppressed(raised)
                continue
            if not self.reactor.ready or issuing():
                return

    def start(
        self,
        task: Task,
        taken: list[Lease],
        *,
        lends: bool,
        sink: Optional[deque[Future[Any]]] = None,
    ) -> Future[Any]:
        """
        Launch a worker, or give the job to one that is at rest. The caller has signals wait.

        Args:
            task: The job.
            taken: The slot for it, or nothing. It is taken out of there; if that fails it goes back
                where it came from.
            lends: Whether a wait for it lends.
            sink: Where the future is put when it is done.
        """
        unheard = True
        try:
            lease = taken[0] if taken else None
            future: Future[Any] = Future(self.admission, lends, sink)
            own = current_slot(self.slots)
            lent = own.consumes and own.lease is None and lease is not None
            if self.reactor.crew.loaded and not is_plain(task):
                self.reactor.unload()  # pickling runs code of the user's
            prepared = self.launcher.prepare(task)
            unheard = False
            bell = -1 if own.key is None else own.bell_for_child(self.slots)
            if (
                lease is None
                or lease.worker is None
                or not self._hand_over(future, prepared, lease, bell)
            ):
                stays = None
                if self.tasks != 1 and lease is not None and lease.seated:
                    stays = Stays(self.tasks, IDLE)
                flight = self.launcher.launch(prepared, lease, bell, stays)
                try:
                    self.reactor.add(future, flight, lease)
                except BaseException:
                    flight.kill()
                    raise
            # The job's from now on, also when Ctrl-C comes as signals are let through again.
            taken.clear()
        except BaseException:
            self.admission.give_all_back(taken, unheard=unheard)
            raise
        # An executor's thread has nothing to go on with: who waits for its futures regains.
        if lent and sink is None:
            self.admission.regain()
        return future

    def _hand_over(self, future: Future[Any], prepared: Any, lease: Lease, bell: int) -> bool:
        """Give the job to the worker at rest that ``lease`` leads to; False if that cannot be."""
        worker = lease.worker
        try:
            done = self.launcher.hand_over(prepared, lease, bell, worker)
        except BaseException:
            worker.send_signal(SIGKILL)  # it may have heard all
            raise
        if done:
            self.reactor.assign(future, worker, lease)
        else:
            self.reactor.dismiss(lease)
        return done

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """The parent's with-blocks are the parent's."""
        self._entered = 0
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        _forking.settle()
        return f"Jobserver({self.method!r}, tracked={len(self.reactor.running)})"

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            raise TypeError(
                "a Jobserver can be pickled only as an argument of a job (or of a"
                " multiprocessing.Process): its slots are open descriptors of this process"
            )
        return _rebuild, (self.slots, self.method, self.tasks, self.slots.key, self.closed)


class Canary:
    """Held by each handle on a pool and by nothing else, so it ends with the last of them."""

    __slots__ = ("__weakref__", "shared")

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        if ends():
            return  # modules may be gone, this one's too; and what is left ends with the process
        reactor = self.shared.reactor
        if _forking.stale():
            return  # what is in flight is the parent's
        running = list(reactor.running)  # at once: other threads may be at it
        try:
            count = 0 if reactor.closed else sum(not future._vain for future in running)
            if count:
                warnings.warn(
                    f"Finalizing {self.shared!r} with {count} running Future{'s' * (count > 1)}",
                    ResourceWarning,
                    source=self,
                    stacklevel=2,
                )
        finally:
            reactor.drop()  # also where warnings are errors


def _rebuild(
    slots: SlotPool, method: str, tasks: Optional[int], key: tuple[int, int], closed: bool
) -> Shared:
    shared = _by_key.get(key)
    # A job that ran here before may have closed its handle, which is no other job's concern.
    if shared is None or (shared.closed and not closed):
        shared = Shared(slots, resolve_context(method), tasks)
        own_slot().attach(slots)
    if closed:
        shared.reactor.close()
    return shared


def _prepared(context: Context) -> BaseContext:
    _forking.settle()
    for reactor in active_reactors():
        reactor.reap()  # also those that nobody will ask any more
    return resolve_context(context)


def resolve_context(context: Context) -> BaseContext:
    """Return the multiprocessing context meant; without fixing the default as a side effect."""
    if isinstance(context, BaseContext):
        return context
    if context is not None and not isinstance(context, str):
        raise TypeError(
            "context must be None, 'fork', 'spawn', 'forkserver' or a multiprocessing context,"
            f" not {type(context).__name__}"
        )
    known = multiprocessing.get_all_start_methods()
    if context is None:
        chosen = multiprocessing.get_start_method(allow_none=True)
        context = known[0] if chosen is None else chosen
    if context not in known:
        raise ValueError(f"context must be one of {', '.join(known)}, not {context!r}")
    return multiprocessing.get_context(context)


def default_pool(*, warm: bool) -> SlotPool:
    """Join the outer make's pool, if there is one; else make one as large as the CPUs allow."""
    try:
        return SlotPool.join(outer_from(os.environ), warm=warm)
    except NoPoolOffered:
        pass
    except PoolUnusable as why:
        warnings.warn(
            f"the outer jobserver in MAKEFLAGS cannot be used: {why}."
            " Using as many slots as this process may use CPUs",
            RuntimeWarning,
            stacklevel=4,
        )
    return SlotPool.create(len(os.sched_getaffinity(0)), warm=warm)
