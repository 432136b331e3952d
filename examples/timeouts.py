# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I wait for a slot, or for a result, no longer than I want to?"""

from __future__ import annotations

import concurrent.futures
import sys
from multiprocessing.synchronize import Event

from jobserver import Blocked, Jobserver


def await_event(event: Event) -> str:
    """Keep a slot until someone sets the event."""
    event.wait()
    return "finished"


def main(context: str | None = None) -> None:
    """Run out of time in submit(), in result(), in wait() and in map()."""
    with Jobserver(context, slots=1) as js:
        release = js.context.Event()
        busy = js(await_event, release)

        # submit() waits for a slot. When it raises Blocked, nothing was started.
        try:
            js.submit(await_event, args=(release,), timeout=0)
        except Blocked:
            print("submit: no slot is free")

        # result() waits for the job. When it raises Blocked, the job goes on unharmed.
        try:
            busy.result(timeout=0.1)
        except Blocked:
            print("result: not ready yet")

        # done() and wait() answer False where result() would raise Blocked.
        print("done:", busy.done(), "- wait:", busy.wait(0.1))

        # The timeout of map() counts from the call, for all of its items together, and ends
        # in the same exception as that of concurrent.futures.
        try:
            list(js.map(await_event, [(release,)], timeout=0.1))
        except concurrent.futures.TimeoutError:
            print("map: out of time")

        release.set()
        print("later:", busy.result())


if __name__ == "__main__":
    main(*sys.argv[1:])
