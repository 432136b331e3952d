# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What can be wrong with the jobserver that MAKEFLAGS offers: one exception for each way.

``Jobserver.from_env`` raises them. ``Jobserver()`` without slots does not: where no pool is offered
(``NoPoolOffered``) it makes one of its own without a word, and where one is offered that cannot be
used (``PoolUnusable``) it does so with a RuntimeWarning that has the same text.
"""

from __future__ import annotations

__all__ = (
    "BadAuth",
    "CannotOpenFifo",
    "DescriptorsClosed",
    "DescriptorsOfOthers",
    "DryRun",
    "MakeflagsError",
    "NoJobserver",
    "NoMakeflags",
    "NoPoolOffered",
    "NotAFifo",
    "PoolDisabled",
    "PoolUnusable",
)


class MakeflagsError(RuntimeError):
    """The environment gives no pool of slots that this process could join."""


class NoPoolOffered(MakeflagsError):
    """Nothing is wrong, but there is no pool."""


class NoMakeflags(NoPoolOffered):
    """MAKEFLAGS is not set, or empty: no make has started this process."""


class NoJobserver(NoPoolOffered):
    """MAKEFLAGS names no jobserver: make runs without ``-j``, with ``-j1`` or a bare ``-j``."""


class DryRun(NoPoolOffered):
    """Make runs with ``-n``: nothing is to be done."""


class PoolUnusable(MakeflagsError):
    """MAKEFLAGS names a pool that this process cannot join."""


class PoolDisabled(PoolUnusable):
    """The pool is not for this process: make does not take its recipe for a sub-make's."""


class BadAuth(PoolUnusable):
    """The jobserver option is neither ``fifo:PATH`` nor two numbers."""


class CannotOpenFifo(PoolUnusable):
    """The FIFO that is named does not exist, or this process may not open it."""


class NotAFifo(PoolUnusable):
    """What is named as a FIFO is another kind of file."""


class DescriptorsClosed(PoolUnusable):
    """The descriptors that are named are not open in this process."""


class DescriptorsOfOthers(PoolUnusable):
    """The descriptors that are named are not the ends of one pipe: their numbers were reused."""
