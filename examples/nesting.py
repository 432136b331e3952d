# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""May a job submit jobs of its own, and what does lend=True change?"""

from __future__ import annotations

import sys

from jobserver import Blocked, Jobserver


def count(js: Jobserver, depth: int) -> int:
    """Count the jobs of a binary tree; every branch is a job that shares the same slots."""
    if depth == 0:
        return 1
    children = [js(count, js, depth - 1) for _ in range(2)]
    return 1 + sum(child.result() for child in children)


def descend(js: Jobserver, levels: int, timeout: float) -> int:
    """Go down one job per level and return how many levels were reached."""
    if levels == 0:
        return 0
    try:
        child = js.submit(descend, args=(js, levels - 1, timeout), timeout=timeout)
    except Blocked:
        return 0
    return 1 + child.result()


def main(context: str | None = None) -> None:
    """Nest with fewer slots than levels, with and without lending while waiting."""
    # A submit without a timeout never deadlocks: the job that is blocked in it lends its own
    # slot to the child. So one slot is enough for a tree of any depth.
    with Jobserver(context, slots=1) as js:
        print("one slot:", js(count, js, 2).result(), "jobs")

    # A submit with a timeout does not lend, and without lend=True a job keeps its slot while it
    # waits in result(): with two slots, only one job can run below the first.
    with Jobserver(context, slots=2) as js:
        print("keeping slots:", js(descend, js, 3, 0).result(), "of 3 levels")

    # With lend=True every job that waits for its child frees its slot for the levels below. The
    # timeout leaves the parent the moment that it needs to get from submit() to result().
    with Jobserver(context, slots=2, lend=True) as js:
        print("lending slots:", js(descend, js, 3, 60).result(), "of 3 levels")


if __name__ == "__main__":
    main(*sys.argv[1:])
