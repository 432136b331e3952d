# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The one background thread of an executor, and what it works on.

Guarantees:

* The thread never refers to the executor itself, so an executor that is dropped is collected, and
  its thread ends when its work is done.
* A call is pending, and can be cancelled, until a slot has been taken for it; in the queue of the
  workers (``_calls``), until one begins it. Whoever takes it out of what is pending, and nobody
  else, settles its promise.
* The thread issues no callbacks registered with ``Jobserver`` futures: those of a shared Jobserver
  belong to the threads of whoever registered them.
* ``stop`` and ``forget`` take no lock that their caller may hold, as the garbage collector calls
  them at any instant: when it finds an executor, or an unfinished iterator of its ``map``.
* No code of the user runs under a lock.

In a job, a thread that waits without a timeout for a promise is *patient*: while there is one, the
job's own slot is the next call's if there is no other. It comes back when a call that somebody
waits for ends, and the waiting thread goes on when the job holds a slot again (see ``_admission``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, ContextManager, Optional

from . import _casualty, _forking
from ._backlog import Backlog, Call
from ._casualty import BROKEN, broken, of_start
from ._engines import engines, interpreter_ends
from ._errors import shown
from ._patience import Patience
from ._promise import Promise
from ._runs import Runs
from ._signals import deferred, outside, stand_aside, step_back
from ._slots._lease import Lease
from ._wakeup import Wakeup
from ._worker._initialize import Initializer

if TYPE_CHECKING:
    from ._jobserver import Jobserver

_TICK = 0.2
_LINGER = 5.0


class Engine:
    """Run submitted calls on a Jobserver, in a thread that is started with the first of them."""

    def __init__(
        self, jobserver: Jobserver, initializer: Optional[Initializer], *, owns: bool
    ) -> None:
        _forking.settle()
        self.jobserver = jobserver
        self.broken: Optional[str] = None
        self.stopping = False
        self._foreign = False  # made by the process that this one was forked from
        self._shared = jobserver._shared
        self._patience = Patience(jobserver)
        self._owns = owns
        self._backlog = Backlog(jobserver._sleep_fn)
        self._runs = Runs(jobserver, initializer, self._backlog, self._patience, _casualty)
        self._sink = self._runs.sink
        self._lease: Optional[Lease] = None
        self.cancelling = False  # what finds no slot at once
        self._wakeup: Optional[Wakeup] = None
        self._thread: Optional[threading.Thread] = None
        # Guards that there is one thread. Finalizers take the lock of the backlog, and this not; so
        # that one is never held while waiting for any other, and this may be.
        self._starting = threading.RLock()
        _forking.track(self, at_leisure=True)

    # What any thread may call

    def submit(self, call: Call, *, more: bool = False) -> Promise[Any]:
        """Queue a call; ``more`` of what was accepted before is accepted until it is cancelled."""
        self.refuse_foreign()
        with deferred(), self._starting:
            promise: Promise[Any] = Promise(self)
            wakeup = self._wakeup or Wakeup(self._shared.reactor)
            try:
                with self._backlog.lock:
                    self._refuse(more=more and threading.current_thread() is self._thread)
                    self._wakeup = wakeup
                    at_once = self._thread is not None and self._runs.begin_at_once(call)
                    alone = not at_once and self._backlog.add(promise, call)
                if self._thread is None:
                    self._start()
                elif at_once:
                    if not self._runs.start_at_once(promise, call):
                        wakeup.ring()
                elif alone:
                    wakeup.ring()
            except BaseException:
                self._backlog.remove(promise)
                if self._thread is None:
                    self._wakeup = None
                    wakeup.close()
                else:
                    wakeup.ring()
                raise
        return promise

    def _refuse(self, *, more: bool) -> None:
        if self.broken is not None:
            raise BrokenProcessPool(self.broken)
        if more and not self.cancelling:
            return
        if interpreter_ends():
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self.stopping:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._shared.refuse_closed()

    def refuse_foreign(self) -> None:
        """Raise RuntimeError in a process that is forked from the executor's own."""
        if self._is_foreign():
            raise RuntimeError(
                "this executor and its futures belong to the process that this one was forked from"
            )

    def _is_foreign(self) -> bool:
        _forking.settle()
        return self._foreign

    def _start(self) -> None:
        # Not a daemon: the interpreter's end waits for it, and has told it before (`_at_exit`).
        mask = outside()
        thread = threading.Thread(target=self._serve, args=(mask,), name="JobserverExecutor")
        with deferred():  # else Ctrl-C could leave a thread running that nobody knows of
            thread.start()
            self._thread = thread
            engines.add(self)

    def stop(self, *, cancel: bool = False, start: bool = True) -> None:
        """
        Take no more work; end once what is there is done.

        Args:
            cancel: Cancel what is pending.
            start: But not what would be running already if the thread had had the time.
        """
        if self._is_foreign():
            return
        dropped = []
        keep = self._free() if cancel and start else 0
        with deferred(), self._backlog.lock:
            self.stopping = True
            if cancel:
                self.cancelling = True
                self._runs.recall()
                dropped = self._backlog.cut(keep)
            wakeup = self._wakeup
        if wakeup is not None:
            wakeup.ring()
        elif self._owns:
            self._shared.reactor.close()
        while dropped:
            dropped.pop().drop()

    def _free(self) -> int:
        with deferred(), self._shared.reactor.lock:
            return 0 if self._shared.closed else self._shared.slots.free()

    def join(self) -> None:
        """Wait for the thread to end; does nothing on that thread itself."""
        if self._is_foreign():
            return
        with deferred(), self._starting:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            with self.awaiting(self):
                thread.join()

    def forget(self, promise: Promise[Any]) -> bool:
        """Drop a call that was cancelled; True if it was pending, so that it is the caller's."""
        if self._is_foreign() or not self._runs.forget(promise):
            return False
        self._look_around()  # it may have been the last one, or the one that sleep_fn held up
        return True

    def look_up(self) -> None:
        """See which calls are running by now."""
        if not self._is_foreign():
            self._runs.look_up()

    def awaiting(self, target: object) -> ContextManager[None]:
        """Return the context in which to wait without a timeout for a promise, or for the end."""
        return self._patience.awaiting(target, self._look_around)

    def signal_workers(self, number: int) -> None:
        """Send a signal to each worker, also to one that is about to start."""
        if self._is_foreign():
            return
        self._runs.send(number)

    def _look_around(self) -> None:
        wakeup = self._wakeup
        if wakeup is not None:
            wakeup.ring()

    def counts(self) -> tuple[int, int]:
        """Return how many calls are pending and running."""
        return self._runs.counts()

    # The thread

    def _serve(self, mask: Iterable[int]) -> None:
        try:
            stand_aside(mask)
            while not self._over():
                try:
                    sought = self._wait()
                except OSError as error:
                    sought = False
                    self._starve(error)
                self._turn(sought)
        except BaseException as error:  # noqa: BLE001  # else every promise would be waited for in vain
            self._break(f"the executor's thread has failed: {shown(error)}", error)
        finally:
            self._close()
            step_back()

    def _over(self) -> bool:
        if not self.stopping and self.broken is None:
            return False
        return not (self._backlog or self._runs)

    def _wait(self) -> bool:
        """Wait until there is something to do; says whether a slot was looked for meanwhile."""
        reactor, wakeup = self._shared.reactor, self._wakeup
        assert wakeup is not None  # noqa: S101  # made before the thread
        head = self._backlog.head()
        arm = (wakeup.fileno(), *self._patience.filenos())
        look_at = self._runs.next_look()
        if (head is None or head.admitted) and self._runs.wanted():
            reactor.wait(
                self._found,
                look_at,
                target=self._sink,
                arm=(*arm, *reactor.slots.filenos()),
                tick=_TICK,
                on_tick=reactor.slots.sweep,
                keep=True,
            )
            return True
        asks_at = None if head is None or head.admitted else head.asks_at
        alarms = [alarm for alarm in (asks_at, look_at) if alarm is not None]
        # An endless pause (inf) is slept in days, which epoll can count.
        alarm = min(*alarms, time.monotonic() + 86400) if alarms else None
        tick = None if head is None else _TICK
        reactor.wait(self._due, alarm, target=self._sink, arm=arm, tick=tick, keep=True)
        return head is not None

    def _starve(self, error: OSError) -> None:
        """There was no descriptor to take a slot with: tell the call that it was wanted for."""
        first = self._backlog.first()
        if first is None:
            raise error
        if not self._shared.closed:  # else it is to be told that
            self._backlog.fail(first, of_start(error))

    def _due(self) -> bool:
        self._patience.listen()
        wakeup = self._wakeup
        if self._sink or (wakeup is not None and wakeup.rung):
            return True
        return self._shared.closed and self._runs.wanted()

    def _found(self) -> bool:
        due = self._due()
        wanted = self._runs.wanted()
        if wanted and not self._shared.closed:
            self._lease = self._shared.reactor.crew.try_take() or self._patience.lend()
        return due or self._lease is not None or not wanted or self.cancelling

    def _turn(self, sought: bool) -> None:
        if self._wakeup is not None:
            self._wakeup.quiet()
        lease, self._lease = self._lease, None
        if lease is None:
            lease = self._take_free()
        found = lease is not None
        while lease is not None:
            self._runs.fill()
            self._runs.start(lease)
            lease = self._take_free()
        self._runs.fill()
        self._shared.reactor.unload()  # what follows is code of the user's
        while self._sink:
            failure = self._runs.complete(self._sink.popleft())
            if failure is not None:
                self._break(BROKEN, failure.__cause__)
        self._runs.look()
        if found:
            pass
        elif self._shared.closed:
            self._runs.recall()
            self._backlog.fail_all(RuntimeError("Jobserver is closed"))
        elif self.cancelling and sought:
            self.stop(cancel=True, start=False)

    def _take_free(self) -> Optional[Lease]:
        """Take a slot for the next call, if there is one at this instant for both."""
        head = self._backlog.head()
        if (head is not None and not head.admitted) or self._shared.closed:
            return None
        if not self._runs.wanted():
            return None
        with deferred(), self._shared.reactor.lock:
            try:
                return self._shared.reactor.crew.try_take()
            except OSError:  # there is no descriptor for it; who waits for a slot tells
                return None

    def _break(self, why: str, error: Optional[BaseException]) -> None:
        """Fail everything. The thread goes on until the workers are gone."""
        with deferred(), self._backlog.lock:
            self.broken = why
        self._runs.fail_all(lambda: broken(why, error))

    def _close(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._shared.admission.give_back(lease, unheard=True)
        if self._wakeup is not None:
            self._wakeup.close()
        self._runs.close()
        if self._owns:
            self._shared.reactor.dissolve()
            self._shared.reactor.reap_lingering(_LINGER)
            self._shared.reactor.close()

    def after_fork_in_child(self, passed: frozenset[int]) -> None:  # noqa: ARG002
        """The thread is the parent's."""
        self._foreign = True
        self._backlog.lock = threading.RLock()
        self._starting = threading.RLock()
        self._thread = None
        engines.discard(self)
