# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The command ``jobserver``: what it is called with, and which of its parts does that."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Optional

from jobserver._version import __version__

EXAMPLES = """\
examples:
  jobserver run -j4 -- ./build.sh     four slots for the script and all that it starts
  jobserver run -j4 --check -- make   ... and say at the end if a token is missing
  jobserver exec -- gcc -c a.c        inside a pool: wait for a slot, compile on it
  jobserver serve -j8 --path ~/pool   one pool for runs that know nothing of each other
  jobserver status                    who takes part in the pool
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    # Imported late: who only wants --help need not wait for it.
    try:
        if options.action == "run":
            from ._run import run

            return run(options.command, options.jobs, check=options.check)
        if options.action == "exec":
            from ._exec import execute

            return execute(options.command)
        if options.action == "serve":
            from ._serve import serve

            return serve(options.path, options.jobs, options.group)
        from ._status import status

        return status(options.path, as_json=options.json, watch=options.watch)
    except UserError as error:
        print(f"jobserver: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:
        # Whoever read the output does not want the rest; nor can the interpreter flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130


class UserError(Exception):
    """Something that the user can put right."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobserver",
        description="Share job slots as GNU make does, with make, ninja, cargo and Python.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"jobserver {__version__}")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    run = actions.add_parser(
        "run",
        help="run a command with a pool of slots of its own",
        description="Run COMMAND with a pool of slots for it and all that it starts. The exit"
        " status is that of COMMAND, or 128 plus the signal that ended it.",
    )
    _add_jobs(run)
    run.add_argument(
        "--check",
        action="store_true",
        help="say at the end whether every token came back, and who may have the rest; if not,"
        " the exit status is 1 where COMMAND's is 0",
    )
    _add_command(run)

    execute = actions.add_parser(
        "exec",
        help="inside a pool: wait for a slot and run a command on it",
        description="Wait for a slot of the pool in MAKEFLAGS, run COMMAND on it, return the slot."
        " The exit status is that of COMMAND, or 128 plus the signal that ended it. A recipe of"
        " make, ninja or cargo is on a slot already: there, and below make -j1, which has no pool,"
        " COMMAND is run at once.",
    )
    _add_command(execute)

    serve = actions.add_parser(
        "serve",
        help="offer one pool to runs that know nothing of each other",
        description="Make a FIFO with N tokens, print the MAKEFLAGS that lead to it, and serve"
        " until SIGTERM or Ctrl-C. Tokens of killed clients are replaced when no client is left.",
    )
    _add_jobs(serve)
    serve.add_argument("--path", required=True, help="where to make the FIFO; must not exist")
    serve.add_argument("--group", help="let this group use it as well (mode 0660, else 0600)")

    status = actions.add_parser(
        "status",
        help="show slots, and who takes part",
        description="Show the pool in MAKEFLAGS, or that of a FIFO: how many slots are free, and"
        " which processes have it open.",
    )
    status.add_argument("--path", help="the FIFO of `jobserver serve`; default: MAKEFLAGS")
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--watch", action="store_true", help="again each second, until Ctrl-C")
    return parser


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-j",
        "--jobs",
        type=_positive,
        metavar="N",
        default=len(os.sched_getaffinity(0)),
        help="how many slots (default: the CPUs that this process may use, %(default)s)",
    )


def _add_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --, with arguments")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
