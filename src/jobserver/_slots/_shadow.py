# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Slots for a foreign tool, which the tool cannot lose.

A foreign client reads tokens into its memory: if it is killed they are gone, and it may write back
what it never took. So it gets a FIFO of its own, with *shadow* tokens in it. Behind each of them is
a lease that this process holds; whatever becomes of the shadows, the leases go back.

Guarantees:

* Shadow tokens in the FIFO and in the tool's hands <= leases. What the tool invents is taken out.
* No lease is kept for a shadow token that lies idle while others could be short of slots: of more
  than one all others go back at once, and the last one after a moment. But a tool that has just
  begun is left the time to take what it can: it starts a command between one token and the next.
* While nothing happens nobody is woken, but for what is said next.

That the tool wants a token cannot be seen, only that it has taken one. So one is offered: when the
FIFO is opened, when the last one has been taken, and later if a slot is free anyway. While there
are more of these, one stays on offer, until others may have become short (see ``_lookout``). But
where it would be the only one, whoever looks for a slot without waiting could not have it; so it
goes back, and no event would tell when to offer it again. Only then is that done by the clock, at
ever longer intervals.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Optional

from jobserver import _forking

from ._lease import Lease
from ._lookout import Lookout
from ._pool import SlotPool
from ._section import new_fifo, write_all
from ._splice import waiting_bytes

# How many seconds an offered token may lie idle while no other slot is free.
_GRACE = 0.05
# How long a tool that has not slept since may take until it looks for them at all.
_BUSY = 1.0
# After how many seconds one is offered anew, at first and at last. A tool that has never touched
# the FIFO probably knows nothing of jobservers.
_REST = 0.2
_LONGEST_REST = 1.6
_LONGEST_UNTOUCHED = 6.4
# Where inotify does not help: after how many seconds to look again, when nothing changes.
_UNHEARD = 0.4


class Shadow:
    """
    One tool's private FIFO.

    Args:
        pool: Where the leases come from.
        now: The ``time.monotonic`` instant.
    """

    def __init__(self, pool: SlotPool, now: float) -> None:
        self._pool = pool
        self._leases: list[Lease] = []
        self.peak = 0
        # The command runs on one. An outer pool may have more tokens than it says.
        self._most = sys.maxsize if pool.joined else pool.slots - 1
        #: Whether the tool has taken all that was offered, and a slot is to be had for it.
        self.hungry = False
        #: Whether one would be offered, but none is free: ``step`` is to be called when one is.
        self.short = False
        #: When ``step`` is to be called at the latest; None if only what happens counts.
        self.wake_at: Optional[float] = None
        self._opened = False
        self._touched = False
        self._held = 0  # by the tool, when last looked at
        self._idle_since = now
        self._filled_until = now
        self._filling = False
        self._most_held = 0
        self._busy_until = now
        #: The tool, once there is one.
        self.pid: Optional[int] = None
        self._rest = _REST
        self._blind_rest = _GRACE
        self._offer_at = now + _GRACE
        self._listening = False
        self._listen_at = now
        with _forking.books_lock():
            self.fifo = new_fifo(1)
            _forking.owned.add(self.fifo)
        self.watch = -1
        self._lookout = Lookout(pool, -1)

    def look(self) -> None:
        """Begin to watch; after the descriptors for the tool were opened, as that is an event."""
        from ._inotify import watch

        with _forking.books_lock():
            spare, self._pool.spare_watch = self._pool.spare_watch, -1
            try:
                self.watch = watch(self.fifo, spare=spare)
            except OSError:
                self._pool.spare_watch = spare
                return  # the system has no more of these: it is looked at from time to time
            _forking.owned.add(self.watch)
        self._lookout = Lookout(self._pool, self.watch)

    def fill(self, now: float) -> None:
        """Offer every free slot for a moment: the tool is about to look for them."""
        self._filling = True
        self._keep_filled(now)
        while len(self._leases) < min(self._most, self._pool.slots) and self.seek():
            pass

    def _keep_filled(self, now: float) -> None:
        self._filled_until = now + _GRACE
        self._busy_until = now + _BUSY

    def seek(self) -> bool:
        """Take a free slot for the tool, if there is one."""
        lease = self._pool.try_take()
        if lease is None:
            return False
        self._leases.append(lease)
        self._idle_since = time.monotonic()
        self.peak = max(self.peak, len(self._leases))
        write_all(self.fifo, b"+")
        return True

    def step(self, now: float) -> None:
        """Compare what was offered with what is left of it, and act on it."""
        if self._has_opened():
            self.fill(now)
        idle = self._count_idle()
        held = len(self._leases) - idle
        if held > self._held:
            self._touched = True
            self.hungry = True
            self._rest = _REST
        if held != self._held:
            self._idle_since = now
            self._blind_rest = _GRACE
        if held > self._most_held:
            self._most_held = held
            if self._filling:
                self._keep_filled(now)
        self._held = held
        self.hungry = self.hungry and len(self._leases) < self._most
        self.wake_at = None if self.watch >= 0 else now + self._blind_rest
        self._blind_rest = min(2 * self._blind_rest, _UNHEARD)
        if idle:
            self._be_modest(idle, now)
        else:
            self._stop_listening()
            if not self.hungry:
                self._try_again(now)

    def _has_opened(self) -> bool:
        if self.watch < 0:
            return False
        from ._inotify import drain

        opened, elsewhere = drain(self.watch)
        if elsewhere:
            self._stop_listening()
        first = opened and not self._opened
        self._opened = self._opened or first
        return first

    def _count_idle(self) -> int:
        idle = waiting_bytes(self.fifo)
        while idle > len(self._leases):
            if not self._take_back():
                break
            idle -= 1
        return min(idle, len(self._leases))

    def _take_back(self) -> bool:
        try:
            return bool(os.read(self.fifo, 1))
        except BlockingIOError:
            return False  # the tool was faster

    def _be_modest(self, idle: int, now: float) -> None:
        self.hungry = self.short = False
        if self._filling:
            if self._filled_until <= now < self._busy_until and _computes(self.pid):
                self._filled_until = now + _GRACE
            self._filling = now < self._filled_until
        if self._filling:
            self._wake_at(self._filled_until)
            return
        self._give_back(idle - 1)
        patient_until = max(self._idle_since, self._filled_until) + _GRACE
        if now < patient_until:
            self._wake_at(patient_until)
        elif not self._others_are_short(now):
            if not self._listening and self.watch >= 0:
                self._wake_at(self._listen_at)
        else:
            self._give_back(1)
            self._offer_at = now + self._rest
            self._lengthen_rest()
            self._try_again(now)

    def _others_are_short(self, now: float) -> bool:
        # First listen, then look: who comes in between is heard. Not all the time while others
        # take and return slots, as each of them would wake us.
        if not self._listening and now >= self._listen_at:
            self._listening = self._lookout.begin(self._leases[-1])
            self._listen_at = now + (_REST if self._listening else _UNHEARD)
        return not self._pool.free()

    def _stop_listening(self) -> None:
        self._listening = False
        self._lookout.end()

    def _lengthen_rest(self) -> None:
        self._rest = min(2 * self._rest, _LONGEST_REST if self._touched else _LONGEST_UNTOUCHED)

    def _try_again(self, now: float) -> None:
        if len(self._leases) >= self._most:
            return  # there is no more to be had
        was_short, self.short = self.short, not self._pool.free()
        if self.short:
            return
        if was_short:
            # Who waits for a slot is quicker than this, so what is free then is nobody's.
            self._offer_at = max(self._offer_at, now + self._rest)
            if not self._touched:
                self._lengthen_rest()
        if now >= self._offer_at:
            self._offer_at = now + self._rest
            if self.seek():
                self._wake_at(now + _GRACE)
                return
        self._wake_at(self._offer_at)

    def _give_back(self, count: int) -> None:
        if count:
            self._stop_listening()  # the lease may be the one that must be held
        for _ in range(count):
            if self._leases and self._take_back():
                self._leases.pop().release()

    def _wake_at(self, instant: float) -> None:
        self.wake_at = instant if self.wake_at is None else min(instant, self.wake_at)

    def release(self) -> None:
        """The tool has ended: all leases go back, and nothing is offered any more."""
        self.hungry = self.short = False
        self.wake_at = None
        self._stop_listening()
        while self._leases:
            self._leases.pop().release()

    def close(self) -> None:
        """Release the leases and close the descriptors. What the tool has left uses its own."""
        self.release()
        fifo, self.fifo = self.fifo, -1
        watched, self.watch = self.watch, -1
        if watched >= 0:
            self._put_away(watched)
        if fifo >= 0:
            _forking.close(fifo)

    def _put_away(self, watched: int) -> None:
        from ._inotify import unwatch

        unwatch(watched)
        with _forking.books_lock():
            if self._pool.spare_watch < 0 and not self._pool.closed:
                self._pool.spare_watch = watched
                return
        _forking.close(watched)


def _computes(pid: Optional[int]) -> bool:
    """Say whether a process runs, wants to run, or waits for a program of its own to be loaded."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            return stream.read().rpartition(b")")[2].split()[0] in (b"R", b"D")
    except OSError:
        return False  # not started yet, or reaped
