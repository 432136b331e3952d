# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Hear of it when others may have become short of slots.

That a pipe has become empty cannot be polled for. But who takes the last token reads from the pipe,
which inotify tells (of a splice on newer kernels only); and who then waits in vain sweeps, which
opens each berth with a token in it, also one of ours.
"""

from __future__ import annotations

from ._lease import Lease
from ._pool import SlotPool


class Lookout:
    """
    Listens once; what is heard makes the descriptor of ``_inotify.watch`` readable.

    Args:
        pool: Whose tokens.
        watch: That descriptor, -1 for none.
    """

    def __init__(self, pool: SlotPool, watch: int) -> None:
        self._pool = pool
        self._watch = watch
        self._numbers: list[int] = []

    def begin(self, lease: Lease) -> bool:
        """
        Listen; False where not all could be heard, so that somebody has to look.

        Args:
            lease: One that is held for as long as this listens, or longer.
        """
        # Without a berth there is nothing that who waits would open.
        if self._watch < 0 or lease.fileno() < 0:
            return False
        from ._inotify import listen

        try:
            for pipe in self._pool.filenos():
                self._numbers.append(listen(self._watch, pipe, openings=False))
            self._numbers.append(listen(self._watch, lease.fileno(), openings=True))
        except OSError:
            self.end()
            return False
        return True

    def end(self) -> None:
        """Do not listen any more; else who uses the descriptor next would hear it."""
        if not self._numbers:
            return
        from ._inotify import ignore

        while self._numbers:
            ignore(self._watch, self._numbers.pop())
