# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I run functions in worker processes and collect what they return?"""

from __future__ import annotations

import sys

from jobserver import Jobserver


def divide(number: float, by: float = 2) -> float:
    """Return number / by; at the module level, so that any worker can find it."""
    return number / by


def main(context: str | None = None) -> None:
    """Submit in three ways, collect in order, and see a job's own exception."""
    with Jobserver(context, slots=2) as js:
        # Each call returns a Future once its job has a slot: at most two run at the same time.
        futures = [js(divide, n) for n in range(3)]
        print("halves:", [future.result() for future in futures])

        # submit() is the long form, with room for options next to the function's own arguments.
        third = js.submit(divide, args=(9,), kwargs={"by": 3})
        print("third:", third.result())

        # map() submits a whole series; each item holds the positional arguments of one call.
        print("quotients:", list(js.map(divide, [(12, 1), (12, 2), (12, 3)])))

        # What the function raises is raised again by result(), with the worker's traceback.
        try:
            js(divide, 1, 0).result()
        except ZeroDivisionError as error:
            print("raised:", type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
