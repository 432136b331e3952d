# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``jobserver status``: slots, and who takes part."""

from __future__ import annotations

import json
import os
import time
from typing import Optional

from jobserver._slots._makeflags import Outer, open_outer, outer_from
from jobserver._slots._splice import waiting_bytes
from jobserver.makeflags import MakeflagsError

from . import UserError
from ._peers import Peer, peers_of


def status(path: Optional[str], *, as_json: bool, watch: bool) -> int:
    """Show a pool; returns the exit status."""
    outer = _open(path)
    while True:
        free = waiting_bytes(outer.fd)
        peers = [peer for peer in peers_of(outer.fd) if peer.pid != os.getpid()]
        print(_json(outer, free, peers) if as_json else _table(outer, free, peers), flush=True)
        if not watch:
            return 0
        time.sleep(1)


def _open(path: Optional[str]) -> Outer:
    try:
        if path is None:
            return outer_from(os.environ)
        quoted = path.replace("\\", "\\\\").replace("$", "$$")
        for blank in " \t\n":
            quoted = quoted.replace(blank, f"\\{blank}")
        return open_outer(f" --jobserver-auth=fifo:{quoted}")
    except MakeflagsError as error:
        raise UserError(str(error)) from None


def _json(outer: Outer, free: int, peers: list[Peer]) -> str:
    return json.dumps(
        {"slots": outer.slots, "free": free, "processes": [peer._asdict() for peer in peers]}
    )


def _table(outer: Outer, free: int, peers: list[Peer]) -> str:
    of = f" of {outer.slots} slots" if outer.slots is not None else ""
    lines = [f"{free} tokens free{of}"]
    if peers:
        lines.append(f"{'PID':>8}  {'SINCE':19}  {'PARKED':>6}  COMMAND")
    for peer in peers:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(peer.since))
        lines.append(f"{peer.pid:8}  {since}  {peer.parked:6}  {peer.command[:100]}")
    return "\n".join(lines)
