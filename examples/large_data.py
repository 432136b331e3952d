# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I hand large data to a job, and get large data back?"""

from __future__ import annotations

import sys

from jobserver import Jobserver

MEGABYTE = 1_000_000


def invert(image: bytearray) -> bytearray:
    """Return the negative of an image, made in place: the argument is the job's own."""
    image[:] = bytes(image).translate(bytes(255 - value for value in range(256)))
    return image


def main(context: str | None = None) -> None:
    """Send an image to a job, which changes it, and get another one back."""
    image = bytearray(b"\x10") * (16 * MEGABYTE)

    with Jobserver(context, slots=2) as js:
        negative = js(invert, image).result()

    print("sent:", len(image) // MEGABYTE, "MB, first byte", image[0])
    print("got:", len(negative) // MEGABYTE, "MB, first byte", negative[0])

    # What was received is this process's own, and can be written to.
    negative[0] = 0
    print("changed here:", negative[0], negative[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
