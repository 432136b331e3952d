# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Measure this package beside others, and write down what was found.

    make bench ARGS="--only noop,large/ours-warm-fork"

Everything is run in turn, in environments made for it. results.json, results.md and the plots go
to build/bench; rows that are not run again stay as they are. `--publish` puts the tables and plots
into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime as dt
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from suite import anatomy, envs, machine, plots, tables
from suite.driver import run_group
from suite.results import Results
from suite.rows import Group, all_groups, select
from suite.systems import SYSTEMS

PAGE = envs.ROOT / "docs" / "performance.md"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only",
        metavar="ROW[,ROW]",
        help="only these rows: a group, a system, or one row, as --list shows them; with * for any",
    )
    parser.add_argument("--list", action="store_true", help="show all rows, and run none")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its figures mean nothing"
    )
    parser.add_argument("--rounds", type=int, help="so many runs of each row, in turn")
    parser.add_argument(
        "--here",
        action="store_true",
        help="with this interpreter, the checkout and what is installed: make no environments",
    )
    parser.add_argument(
        "--anatomy",
        action="store_true",
        help="where the time of one job goes: CPU, page faults, system calls (strace counts them)",
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write anew")
    parser.add_argument(
        "--publish", action="store_true", help="write into docs/performance.md, too"
    )
    parser.add_argument(
        "--output", type=Path, help="where to; build/bench, or build/bench-quick of a smoke run"
    )
    found = parser.parse_args(words)
    if found.output is None:
        found.output = envs.ROOT / "build" / ("bench-quick" if found.quick else "bench")
    if found.quick and found.publish:
        parser.error("a smoke run is not published")
    if found.rounds is not None and found.rounds < 1:
        parser.error("--rounds must be at least 1")
    return found


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    options = arguments(words)
    try:
        chosen = select(all_groups(), options.only.split(",") if options.only else ["*"])
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if options.anatomy:
        return examine(options)
    if options.list:
        print("\n".join(row.id for group in chosen for row in group.rows))
        return 0
    store = options.output / "results.json"
    results = Results.load(store)
    # What an earlier version measured under names that there are no more.
    names = {row.id for group in all_groups() for row in group.rows}
    results.rows = {name: record for name, record in results.rows.items() if name in names}
    failed = 0
    if not options.report:
        failed = measure(chosen, results, options)
        results.save(store)
    elif not results.rows:
        print(f"{store} has no results to report", file=sys.stderr)
        return 2
    if options.publish and results.brief:
        print("a smoke run is not published", file=sys.stderr)
        return 2
    write(results, options)
    if options.publish:
        publish(results)
    return 1 if failed else 0


def examine(options: argparse.Namespace) -> int:
    """Show where the time of one job goes."""
    wanted = options.only.split(",") if options.only else ["*"]
    kinds = [kind for kind in anatomy.KINDS if any(fnmatchcase(kind.system, one) for one in wanted)]
    names = sorted({SYSTEMS[kind.system].environment for kind in kinds})
    environments = envs.here(names) if options.here else envs.make_all(names)
    text = anatomy.examine(kinds, environments, options.rounds or 5)
    print(text)
    if options.publish:
        tables.insert(PAGE, text, tables.ANATOMY)
        print(PAGE)
    return 0


def measure(groups: list[Group], results: Results, options: argparse.Namespace) -> int:
    """Run the rows and put them into the results; how many of them failed."""
    names = sorted({row.system.environment for group in groups for row in group.rows})
    environments = envs.here(names) if options.here else envs.make_all(names)
    started = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
    session: dict[str, Any] = {
        "quick": options.quick,
        "machine": machine.describe(),
        "commit": machine.commit(envs.ROOT),
        "load_before": machine.load(),
        "versions": {name: found.versions for name, found in environments.items()},
    }
    results.sessions[started] = session
    failed = 0
    for group in groups:
        rounds = options.rounds or (1 if options.quick else group.rounds)
        records = run_group(group, environments, started, rounds=rounds, quick=options.quick)
        results.rows.update(records)
        failed += sum(bool(record.failures) for record in records.values())
        session["load_after"] = machine.load()
        # What takes long is kept as it comes.
        results.save(options.output / "results.json")
    return failed


def write(results: Results, options: argparse.Namespace) -> None:
    """Write the tables, and the plots where they can be drawn."""
    page = options.output / "results.md"
    page.write_text(tables.report(all_groups(), results))
    print(page)
    try:
        for path in plots.draw_all(all_groups(), results, options.output):
            print(path)
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)


def publish(results: Results) -> None:
    """Put tables and plots into the documentation."""
    target = PAGE.with_suffix("")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    drawn = plots.draw_all(all_groups(), results, target)
    pictures = "\n\n".join(f"![{path.stem}]({target.name}/{path.name})" for path in drawn)
    tables.insert(PAGE, f"{tables.report(all_groups(), results)}\n### Plots\n\n{pictures}")
    print(PAGE)


if __name__ == "__main__":
    sys.exit(main())
