# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Run the tests on every interpreter at hand.

    python tools/test_all.py [--skip 3.11] [--jobs 2] [--only-summary]

Looked for, the first of each version wins: what the variable JOBSERVER_PYTHONS names (paths with
`:` between), then python3.9 to python3.14 on PATH, then pyenv's versions.  Each has an environment
of its own, `.venv-3.9` and so on.  The end tells which interpreters ran, which were not found, and,
as the last line, `N passed, N failed`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VERSIONS = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]
PROBE = "import sys; print(sys.executable, '{}.{}'.format(*sys.version_info[:2]))"
# A run that takes longer than this hangs.
LIMIT = "1500"


def candidates() -> list[str]:
    """Every place where an interpreter may be, the most wanted first."""
    named = [path for path in os.environ.get("JOBSERVER_PYTHONS", "").split(os.pathsep) if path]
    on_path = [path for path in (shutil.which(f"python{version}") for version in VERSIONS) if path]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return named + on_path + [str(path) for path in sorted(pyenv.glob("*/bin/python"))]


def interpreters() -> dict[str, str]:
    """The interpreter that stands for each version that was found."""
    found: dict[str, str] = {}
    for path in candidates():
        # A name on PATH may be a shim for a version that is not there: only what runs counts.
        probe = subprocess.run([path, "-c", PROBE], capture_output=True, text=True, check=False)
        if probe.returncode == 0:
            executable, version = probe.stdout.rsplit(maxsplit=1)
            if version in VERSIONS:
                found.setdefault(version, executable)
    return {version: found[version] for version in VERSIONS if version in found}


class Runs:
    """The runs that are going on, some of them at the same time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False

    def all(self, found: dict[str, str]) -> dict[str, bool]:
        """Run the tests on each interpreter; which of them passed."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                return dict(zip(found, pool.map(self.one, found, found.values())))
            except BaseException:
                self.stop()
                raise

    def one(self, version: str, python: str) -> bool:
        """True when the tests passed on that interpreter; what they said comes in one piece."""
        venv = Path(f".venv-{version}")
        (venv / "junit.xml").unlink(missing_ok=True)
        make = ["make", "--no-print-directory", "test", f"PYTHON={python}", f"VENV={venv}"]
        with self.lock:
            if self.stopped:
                return False
            print(f"== Python {version}: {python}: started", flush=True)
            process = subprocess.Popen(
                ["timeout", "-k", "10", LIMIT, *make],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            self.processes.add(process)
        with process:
            output = process.communicate()[0]
        with self.lock:
            self.processes.discard(process)
            how = f"failed, exit status {process.returncode}" if process.returncode else "passed"
            print(
                f"\n== Python {version}: {python}\n{output}== Python {version}: {how}", flush=True
            )
        return process.returncode == 0

    def stop(self) -> None:
        """Whoever stops us stops the runs as well: `timeout` hands the signal on to all of it."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def sum_up(venvs: list[Path]) -> int:
    """Print a line for each environment's last run, then the sum; how many tests failed in all."""
    passed = failed = 0
    for venv in sorted(venvs, key=version_of):
        version = ".".join(map(str, version_of(venv)))
        report = venv / "junit.xml"
        if not report.exists():
            print(f"Python {version}: no report, so the run has not come to its end")
            failed += 1
            continue
        suite = ET.parse(report).getroot().find("testsuite")
        assert suite is not None
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        good = tests - bad - skipped
        seconds = float(suite.get("time", 0))
        print(f"Python {version}: {good} passed, {bad} failed, {skipped} skipped, {seconds:.0f} s")
        passed, failed = passed + good, failed + bad
    print(f"{passed} passed, {failed} failed")
    return failed


def version_of(venv: Path) -> tuple[int, ...]:
    """The version of the interpreter that a virtual environment was made for."""
    match = re.search(
        r"^version = (\d+)\.(\d+)\.(\d+)", (venv / "pyvenv.cfg").read_text(), re.MULTILINE
    )
    assert match is not None
    return tuple(map(int, match.groups()))


def main() -> int:
    """The exit status: 0 when there was something to run and all of it passed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = argparse.ArgumentParser(description="Run the tests on every interpreter at hand.")
    parser.add_argument("--skip", action="append", default=[], help="leave out this version")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once (default: 1)")
    parser.add_argument("--only-summary", action="store_true", help="sum up what ran last")
    options = parser.parse_args()
    if options.only_summary:
        # Those of them that are for tests.
        stamps = Path().glob(".venv*/.stamp-group-test")
        return int(sum_up([stamp.parent for stamp in stamps]) > 0)
    found = {v: python for v, python in interpreters().items() if v not in options.skip}
    if not found:
        print("No interpreter found.")
        return 1
    results = Runs(options.jobs).all(found)
    print("\nRan on:", *(f"{v} ({'passed' if ok else 'FAILED'})" for v, ok in results.items()))
    missing = [v for v in VERSIONS if v not in found and v not in options.skip]
    print("Not found, so not run:", *(missing or ["none"]))
    sum_up([venv for venv in (Path(f".venv-{version}") for version in found) if venv.exists()])
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
