# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Single operations, timed by pyperf.

    python micro.py NAME [pyperf's options]

Each function runs its operation so many times, and returns the seconds that took.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any, Callable

import workload

#: Times an import in an interpreter that has imported nothing but what it imports by itself.
IMPORT = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def seconds_of_import(loops: int, module: str) -> float:
    command = [sys.executable, "-c", IMPORT.format(module)]
    return sum(float(subprocess.check_output(command)) for _ in range(loops))


def import_jobserver(loops: int) -> float:
    """Import this package."""
    return seconds_of_import(loops, "jobserver")


def import_executor(loops: int) -> float:
    """Import this package and what its executor needs."""
    return seconds_of_import(loops, "jobserver; jobserver.JobserverExecutor")


def import_futures(loops: int) -> float:
    """Import what ProcessPoolExecutor needs."""
    return seconds_of_import(loops, "concurrent.futures.process")


def slot(loops: int) -> float:
    """Take a slot, and return it."""
    from jobserver._slots._pool import SlotPool

    pool = SlotPool.create(2)
    begin = time.perf_counter()
    for _ in range(loops):
        lease = pool.try_take()
        assert lease is not None
        lease.release()
    took = time.perf_counter() - begin
    pool.close()
    return took


def frame(loops: int) -> float:
    """Make a frame of a small result."""
    from jobserver import _wire

    result = {"name": "something", "value": 1.5}
    begin = time.perf_counter()
    for _ in range(loops):
        _wire.encode(_wire.RESULT, "", _wire.dump(result))
    return time.perf_counter() - begin


def channel(loops: int) -> float:
    """Make a frame of a small job, send it through a pipe, and read it back."""
    from jobserver import _reader, _wire

    job: tuple[Any, ...] = (workload.nothing_with, (1,), {})
    reader, writer = os.pipe()
    begin = time.perf_counter()
    for _ in range(loops):
        _wire.send(writer, _wire.encode(_wire.TASK, "", _wire.dump(job)))
        got = None
        incoming = _reader.FrameReader()
        while got is None:
            got = incoming.feed(reader)
        got.load()
    took = time.perf_counter() - begin
    os.close(reader)
    os.close(writer)
    return took


OPERATIONS: dict[str, Callable[[int], float]] = {
    "import-jobserver": import_jobserver,
    "import-executor": import_executor,
    "import-futures": import_futures,
    "slot": slot,
    "frame": frame,
    "channel": channel,
}


def main() -> None:
    import pyperf

    def pass_name(command: list[str], arguments: Any) -> None:
        command.append(arguments.name)

    runner: Any = pyperf.Runner(add_cmdline_args=pass_name)
    runner.argparser.add_argument("name", choices=OPERATIONS)
    name = runner.parse_args().name
    runner.bench_time_func(name, OPERATIONS[name])


if __name__ == "__main__":
    main()
