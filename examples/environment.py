# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How do I give jobs other environment variables than my own process has?"""

from __future__ import annotations

import os
import sys

from jobserver import Jobserver


def look(*names: str) -> dict[str, str | None]:
    """Return what this process's environment says about some names."""
    return {name: os.environ.get(name) for name in names}


def main(context: str | None = None) -> None:
    """Set, override, and unset variables for jobs, and leave this process as it was."""
    os.environ["COLOUR"] = "green"
    os.environ.pop("SHAPE", None)
    names = ("COLOUR", "SHAPE")

    with Jobserver(context, slots=2, env={"SHAPE": "round"}) as js:
        print("default of the handle:", js(look, *names).result())

        # A submission's own env takes the place of the handle's: it is not merged with it.
        own = js.submit(look, args=names, env={"COLOUR": "red"})
        print("own of the submission:", own.result())

        # None unsets a name.
        bare = js.submit(look, args=names, env={"COLOUR": None})
        print("with a name unset:", bare.result())

        # A sibling handle has other defaults and shares the same slots.
        square = js.replace(env=[("SHAPE", "square")])
        print("default of a sibling:", square(look, *names).result())

    print("this process:", look(*names))


if __name__ == "__main__":
    main(*sys.argv[1:])
