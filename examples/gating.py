# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I hold new jobs back until the machine has enough free memory?"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from jobserver import Blocked, Jobserver

MIB = 1 << 20


def available_memory() -> int:
    """Return the bytes that the kernel thinks a new program could use without swapping."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024  # The kernel's "kB" are 1,024 bytes.


def need_memory(needed: int) -> float | None:
    """Accept the work (None) when that many bytes are free, else ask again after 50 ms."""
    return None if available_memory() >= needed else 0.05


def fill(size: int) -> int:
    """Use that many bytes."""
    return len(bytearray(size))


def main(context: str | None = None) -> None:
    """Gate all jobs of one handle, and one submission by a stricter rule."""
    gate = functools.partial(need_memory, 32 * MIB)
    with Jobserver(context, slots=2, sleep_fn=gate) as js:
        sizes = list(js.map(fill, [(MIB,), (2 * MIB,), (3 * MIB,)]))
        print("filled:", [size // MIB for size in sizes], "MiB")

        # No machine has an exbibyte free, so this gate never opens and the timeout decides.
        try:
            js.submit(
                fill,
                args=(MIB,),
                sleep_fn=functools.partial(need_memory, 1 << 60),
                timeout=0.2,
            )
        except Blocked:
            print("not enough memory: nothing was started")


if __name__ == "__main__":
    main(*sys.argv[1:])
