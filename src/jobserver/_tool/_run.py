# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``jobserver run``: a pool for one command and all that it starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jobserver._slots._announce import ChildEnv, compose
from jobserver._slots._pool import SlotPool

from . import UserError
from ._attend import attend
from ._peers import peers_of


def run(command: Sequence[str], slots: int, *, check: bool) -> int:
    """Run a command with ``slots`` slots, one of which is its own; returns its exit status."""
    if slots == 1:
        # As make does: a pool without tokens would only have its clients wait.
        flags = compose(os.environ.get("MAKEFLAGS", ""), "none", "", "", 1)
        return attend(command, {**os.environ, "MAKEFLAGS": flags})
    try:
        pool = SlotPool.create(slots)
    except OSError as error:
        raise UserError(str(error.strerror)) from None
    lease = pool.try_take()
    pipe = pool.shared_pipe()
    with ChildEnv(pipe, slots, "universal", {}) as env:
        status = attend(command, env, env.pass_fds)
    if lease is not None:
        lease.release()
    if check and not _complete(pool, slots):
        return status or 1
    return status


def _complete(pool: SlotPool, slots: int) -> bool:
    """Say whether all tokens are back, and tell the user if not."""
    missing = slots - pool.free()
    if not missing:
        return True
    what = "token is" if abs(missing) == 1 else "tokens are"
    if missing < 0:
        print(f"jobserver: {-missing} {what} too many", file=sys.stderr)
        return False
    print(f"jobserver: {missing} of {slots - 1} {what} missing", file=sys.stderr)
    peers = [peer for peer in peers_of(pool.shared_pipe()) if peer.pid != os.getpid()]
    for peer in peers:
        print(f"jobserver: still open in process {peer.pid}: {peer.command}", file=sys.stderr)
    if not peers:
        print("jobserver: lost by a process that has ended without returning it", file=sys.stderr)
    return False
