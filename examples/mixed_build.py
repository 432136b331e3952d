#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Build three C libraries at once: by make, by ninja and by Python jobs, on one set of slots.

The sources of zstd, lz4 and xxhash come from PyPI's sdists of their bindings, downloaded once by
pip. Each library is a job: one has make build it, one ninja, and one submits a job for each file.
Further jobs make tables of the symbols, hashes, and one zip of it all, which is the same bytes
whoever builds it: in any number of slots, by any start method, with a make killed on the way.

Started from a recipe of make -jN (with a + before it), its slots are those of that make.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mixed.builders import BuildError
from mixed.fetch import FetchError, fetch, unpack
from mixed.foreman import WorkError, open_pool, run, workplace
from mixed.show import Progress, as_json, as_table, verdict
from mixed.tools import ToolError, find_tools

from jobserver.makeflags import DryRun

if TYPE_CHECKING:
    from collections.abc import Sequence

WORK = Path(__file__).resolve().parents[1] / "build" / "mixed"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--slots",
        metavar="N",
        type=count,
        help="how many commands may run at once (default: those of the outer make, else 2)",
    )
    parser.add_argument(
        "--context",
        metavar="M",
        choices=("fork", "spawn", "forkserver"),
        default="fork",
        help="how jobs are started: %(choices)s (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        metavar="DIR",
        type=Path,
        default=WORK,
        help="where to build; what an earlier run has left there is removed (default: %(default)s)",
    )
    parser.add_argument(
        "--sdists",
        metavar="DIR",
        type=Path,
        help="where the downloads are, or go (default: sdists beside the folder to build in)",
    )
    parser.add_argument(
        "--kill-make", action="store_true", help="send SIGKILL to the make in mid-build"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def count(text: str) -> int:
    """A number of slots."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, and print the report."""
    options = parse(arguments)
    work = options.work.resolve()
    sdists = options.sdists.resolve() if options.sdists else work.parent / "sdists"
    tools = find_tools()
    fetch(sdists)
    with workplace(work) as root:
        unpack(sdists, root / "sources")
        pool = open_pool(options.context, options.slots, root)
        if pool.warning:
            print(f"warning: {pool.warning}", file=sys.stderr)
        with Progress(sys.stderr) as on_objects:
            done = run(pool, root, tools, kill_make=options.kill_make, on_objects=on_objects)
    print(json.dumps(as_json(done)) if options.json else "\n".join(as_table(done)))
    if options.kill_make and not done.killed:
        print("no make was killed: it was too quick", file=sys.stderr)
        return 1
    return 1 if verdict(done) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except DryRun:
        sys.exit(0)
    except (OSError, BuildError, FetchError, ToolError, WorkError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
