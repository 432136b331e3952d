# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do many short jobs share a worker process, and what does the next one find there?"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from jobserver import Jobserver

CACHE: dict[int, int] = {}


def square(number: int) -> tuple[int, bool, int]:
    """Return the square, whether this process knew it already, and the process."""
    known = number in CACHE
    CACHE[number] = number * number
    return CACHE[number], known, os.getpid()


def wander() -> str:
    """Change what is of the process, rather than of the job."""
    os.chdir("/proc")
    os.environ["MOOD"] = "changed"
    return os.environ["COLOUR"]


def look(here: Path) -> tuple[bool, bool, bool]:
    """Look whether anything of that has stayed."""
    return Path.cwd() != here, "MOOD" in os.environ, "COLOUR" in os.environ


def main(context: str | None = None) -> None:
    """Submit one job after the other to one slot."""
    with Jobserver(context, slots=1, max_tasks_per_child=None) as js:
        first, again = js(square, 12).result(), js(square, 12).result()
        print("same process:", first[2] == again[2], "- known the second time:", again[1])

        print("in the job's environment:", js.submit(wander, env={"COLOUR": "blue"}).result())
        print("left for the next job:", any(js(look, Path.cwd()).result()))

    with Jobserver(context, slots=1, max_tasks_per_child=2) as js:
        print("processes for six jobs:", len({js(square, n).result()[2] for n in range(6)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
