# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Who is measured: every system by the name that rows have for it."""

from __future__ import annotations

from typing import NamedTuple


class System(NamedTuple):
    """Something that runs jobs: the case that stands for it, and its name in the tables."""

    title: str
    environment: str
    case: str
    variant: str


def _ours(title: str, variant: str) -> System:
    return System(f"**jobserver**, {title}", "ours", "case_ours.py", variant)


SYSTEMS: dict[str, System] = {
    "ours-fork": _ours("fork", "fork"),
    "ours-forkserver": _ours("forkserver", "forkserver"),
    "ours-spawn": _ours("spawn", "spawn"),
    "ours-warm-fork": _ours("warm, fork", "warm-fork"),
    "ours-warm-forkserver": _ours("warm, forkserver", "warm-forkserver"),
    "ours-executor-fork": _ours("executor, fork", "executor-fork"),
    "ours-executor-forkserver": _ours("executor, forkserver", "executor-forkserver"),
    "ours-map-1": _ours("warm, map, chunksize 1", "map-1"),
    "ours-map-100": _ours("warm, map, chunksize 100", "map-100"),
    "ours-map-auto": _ours('warm, map, chunksize "auto"', "map-auto"),
    "ours-fork-map-1": _ours("fork, map, chunksize 1", "fork-map-1"),
    "ours-fork-map-100": _ours("fork, map, chunksize 100", "fork-map-100"),
    "ours-fork-map-auto": _ours('fork, map, chunksize "auto"', "fork-map-auto"),
    "ours-executor-map-1": _ours("executor, map, chunksize 1", "executor-map-1"),
    "ours-executor-map-100": _ours("executor, map, chunksize 100", "executor-map-100"),
    "ours-import": System("**`import jobserver`**", "ours", "case_micro.py", "import-jobserver"),
    "ours-import-executor": System(
        "**`from jobserver import JobserverExecutor`**", "ours", "case_micro.py", "import-executor"
    ),
    "futures-import": System(
        "`import concurrent.futures.process`", "ours", "case_micro.py", "import-futures"
    ),
    "ours-slot": System("take a slot and return it", "ours", "case_micro.py", "slot"),
    "ours-frame": System("make the frame of a small result", "ours", "case_micro.py", "frame"),
    "ours-channel": System(
        "make the frame of a small job, send it, read it", "ours", "case_micro.py", "channel"
    ),
    "peer-fork": System("PyPI's jobserver 3.0.1, fork", "peer", "case_peer.py", "fork"),
    "peer-forkserver": System(
        "PyPI's jobserver 3.0.1, forkserver", "peer", "case_peer.py", "forkserver"
    ),
    "peer-executor-fork": System(
        "PyPI's jobserver 3.0.1, executor, fork", "peer", "case_peer.py", "executor-fork"
    ),
    "pool-fresh-fork": System(
        "`Pool(maxtasksperchild=1)`, fork", "stdlib", "case_pool.py", "fresh-fork"
    ),
    "pool-fork": System("`Pool`, fork", "stdlib", "case_pool.py", "fork"),
    "pool-imap-1": System("`Pool.imap`, chunksize 1; `apply`", "stdlib", "case_pool.py", "imap-1"),
    "pool-map-100": System("`Pool.map`, chunksize 100", "stdlib", "case_pool.py", "map-100"),
    "ppe-fork": System("`ProcessPoolExecutor`, fork", "stdlib", "case_ppe.py", "fork"),
    "ppe-forkserver": System(
        "`ProcessPoolExecutor`, forkserver", "stdlib", "case_ppe.py", "forkserver"
    ),
    "ppe-map-1": System("`ProcessPoolExecutor.map`, chunksize 1", "stdlib", "case_ppe.py", "map-1"),
    "ppe-map-100": System(
        "`ProcessPoolExecutor.map`, chunksize 100", "stdlib", "case_ppe.py", "map-100"
    ),
    "process-fork": System(
        "`multiprocessing.Process`, fork, no result", "stdlib", "case_process.py", "fork"
    ),
    "process-forkserver": System(
        "`multiprocessing.Process`, forkserver, no result",
        "stdlib",
        "case_process.py",
        "forkserver",
    ),
    "loky-map-1": System("loky 3.7, map, chunksize 1", "loky", "case_loky.py", "map-1"),
    "loky-map-100": System("loky 3.7, map, chunksize 100", "loky", "case_loky.py", "map-100"),
    "joblib": System("joblib 1.6, `Parallel`", "joblib", "case_joblib.py", "auto"),
    "mpire-map-1": System("mpire 2.10, map, chunk size 1", "mpire", "case_mpire.py", "map-1"),
    "mpire-map-100": System("mpire 2.10, map, chunk size 100", "mpire", "case_mpire.py", "map-100"),
    "pebble-map-1": System("Pebble 5.2, map, chunksize 1", "pebble", "case_pebble.py", "map-1"),
    "pebble-map-100": System(
        "Pebble 5.2, map, chunksize 100", "pebble", "case_pebble.py", "map-100"
    ),
    "floor-fork": System(
        "limit: bare `os.fork`, `_exit`, `waitpid`", "stdlib", "case_floor.py", "fork"
    ),
    "floor-job": System(
        "limit: `os.fork`, a pickled result in a pipe", "stdlib", "case_floor.py", "job"
    ),
    "floor-promises": System(
        "limit: the same, with a slot, a death and signals as promised",
        "stdlib",
        "case_promises.py",
        "promises",
    ),
    "floor-zygote": System(
        "limit: a fork by a zygote that gets the call", "stdlib", "case_floor.py", "zygote"
    ),
    "floor-pipes": System(
        "limit: warm processes, one byte each way", "stdlib", "case_floor.py", "pipes"
    ),
    "floor-copy": System("limit: one copy in memory", "stdlib", "case_floor.py", "copy"),
}
