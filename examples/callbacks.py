# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I run code when a job completes, and where do the errors of that code go?"""

from __future__ import annotations

import sys
from typing import Any

from jobserver import CallbackRaised, Future, Jobserver


def double(number: int) -> int:
    """Return twice the number."""
    return 2 * number


def complain(about: str) -> None:
    """Stand for a callback with a bug."""
    raise ValueError(about)


def drain(future: Future[Any]) -> list[CallbackRaised]:
    """Wait for the job and collect what its callbacks raised, one error for each call."""
    errors: list[CallbackRaised] = []
    while True:
        try:
            future.wait()
            return errors
        except CallbackRaised as error:
            errors.append(error)


def main(context: str | None = None) -> None:
    """Register callbacks, good and bad, before and after completion."""
    seen: list[str] = []
    with Jobserver(context, slots=1) as js:
        future = js(double, 21)
        # Callbacks run in this process, in this order, on the thread that sees the completion.
        # They get what is given here and no more: pass the Future when they need it.
        future.when_done(seen.append, "first")
        future.when_done(complain, "second")
        future.when_done(lambda done: seen.append(f"third: {done.result()}"), future)
        future.when_done(complain, about="fourth")

        for error in drain(future):
            print(f"callback {error.seqno} raised {error.__cause__!r}")
        print("seen:", seen)

        # Errors of callbacks take nothing from the result.
        print("result:", future.result())

        # A callback for a job that is already done runs at once. The slot is back by then, so
        # a callback may submit work even when there is only one slot.
        chained: list[Future[int]] = []
        future.when_done(lambda: chained.append(js(double, future.result())))
        print("chained:", chained[0].result())


if __name__ == "__main__":
    main(*sys.argv[1:])
