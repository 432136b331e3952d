#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Report on a tree of files, with a job for every folder and every file.

A folder's job submits its sub-folders and files as jobs of their own, and all share one set of
slots, handed down as an argument. Each file is tokenized, measured, compressed and hashed; each
folder combines its children into a node of a Merkle tree. Whoever runs it, the root hash is the
same: in any number of slots, by any start method, with jobs killed on the way, and without jobs.

Folders named __pycache__ and site-packages are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from archive.crew import DeadlyFolderError
from archive.folders import count_files
from archive.foreman import run_alone, run_crew
from archive.show import Progress, Result, as_json, as_table

if TYPE_CHECKING:
    from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        type=folder,
        default=sysconfig.get_paths()["stdlib"],
        help="the folder to report on (default: the standard library, %(default)s)",
    )
    parser.add_argument(
        "--slots",
        metavar="N",
        type=count,
        default=len(os.sched_getaffinity(0)),
        help="how many jobs may run at once (default: the CPUs at hand, %(default)s)",
    )
    parser.add_argument(
        "--context",
        metavar="M",
        choices=("fork", "spawn", "forkserver"),
        default="fork",
        help="how jobs are started: %(choices)s (default: %(default)s)",
    )
    parser.add_argument(
        "--kill-some", action="store_true", help="send SIGKILL to random jobs, running or waiting"
    )
    parser.add_argument(
        "--no-serial", action="store_true", help="leave out the serial run, which is for comparison"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def folder(text: str) -> Path:
    """A folder that can be listed."""
    path = Path(text).resolve()
    try:
        os.scandir(path).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text!r}: {reason}") from None
    return path


def count(text: str) -> int:
    """A number of slots."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report with jobs and, to compare, without; print it."""
    options = parse(arguments)
    total = count_files(options.path)

    with Progress(sys.stderr, "jobs", total) as on_files:
        parallel = run_crew(
            options.path, options.context, options.slots, options.kill_some, on_files
        )
    serial = None
    if not options.no_serial:
        with Progress(sys.stderr, "serial", total) as on_files:
            serial = run_alone(options.path, on_files)

    result = Result(options.path, options.context, options.slots, parallel, serial)
    text = json.dumps(as_json(result)) if options.json else "\n".join(as_table(result))
    # Names may have characters that stdout has not.
    print(text.encode(sys.stdout.encoding, "backslashreplace").decode(sys.stdout.encoding))
    return 0 if result.same_hash else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, DeadlyFolderError) as error:
        sys.exit(f"{Path(__file__).name}: error: {error}")
