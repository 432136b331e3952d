# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``jobserver exec``: run a command on a slot of the outer pool."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jobserver import Jobserver
from jobserver.makeflags import DryRun, MakeflagsError, NoJobserver

from . import UserError
from ._attend import attend

_SHELLS = ("sh", "bash", "dash", "ksh", "zsh", "busybox")
_BUILDERS = ("make", "gmake", "ninja", "samu", "cargo")


def execute(command: Sequence[str]) -> int:
    """Wait for a slot, run a command on it; returns its exit status."""
    if _is_recipe():
        return attend(command, os.environ)
    try:
        js = Jobserver.from_env("fork")
    except NoJobserver:
        return attend(command, os.environ)  # one thing at a time, on the slot of our caller
    except DryRun:
        return 0
    except MakeflagsError as error:
        raise UserError(str(error)) from None
    slots = js._shared.slots
    # The implicit slot is our caller's, who may have started many of us.
    implicit = slots.try_take()
    with js, js.slot(), js.child_env() as env:
        status = attend(command, env, env.pass_fds)
    del implicit
    return status


def _is_recipe() -> bool:
    """
    Say whether a builder has started this process: then it has a slot, and must not want another.

    All tokens may be with recipes like this one, which would wait for each other for ever. It may
    also be a shell that the builder has started.
    """
    name, parent = _process(os.getppid())
    if name in _SHELLS:
        name, _ = _process(parent)
    return name.startswith(_BUILDERS)


def _process(pid: int) -> tuple[str, int]:
    """Return the name of a process, and its parent."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            head, _, tail = stream.read().decode(errors="replace").rpartition(")")
    except OSError:
        return "", 0
    return head.partition("(")[2], int(tail.split()[1])
