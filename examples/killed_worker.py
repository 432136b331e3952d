# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What happens to the other jobs when one worker is killed, and how do I retry it?"""

from __future__ import annotations

import os
import signal
import sys

from jobserver import Jobserver, SubmissionDied


def square(number: int, victim: bool = False) -> int:
    """Return number squared, unless something like the out-of-memory killer strikes first."""
    if victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def main(context: str | None = None) -> None:
    """Lose one of four workers, keep the other three, and run the lost job again."""
    with Jobserver(context, slots=2) as js:
        futures = [js(square, number, victim=number == 2) for number in range(4)]
        squares = []
        for number, future in enumerate(futures):
            try:
                squares.append(future.result())
            except SubmissionDied as death:
                # As in subprocess and multiprocessing, a negative exit code names the signal.
                print(f"square({number}) was killed, exitcode {death.exitcode}: once more")
                squares.append(js(square, number).result())
        print("squares:", squares)

        # A worker that leaves without an answer is the same case, with the code that it chose.
        try:
            js(os._exit, 3).result()
        except SubmissionDied as death:
            print("left with exitcode", death.exitcode)


if __name__ == "__main__":
    main(*sys.argv[1:])
