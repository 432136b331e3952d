# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Run the tests on every interpreter at hand.

    python tools/test_all.py [--skip 3.11] [--only-summary]

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
import xml.etree.ElementTree as ET
from pathlib import Path

VERSIONS = ["3.9", "3.10", "3.11", "3.12", "3.13", "3.14"]
PROBE = "import sys; print(sys.executable, '{}.{}'.format(*sys.version_info[:2]))"
# A run that takes longer than this hangs.
LIMIT = "900"


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


def run(version: str, python: str) -> bool:
    """True when the tests passed on that interpreter."""
    venv = Path(f".venv-{version}")
    (venv / "junit.xml").unlink(missing_ok=True)
    print(f"\n== Python {version}: {python}", flush=True)
    make = ["make", "--no-print-directory", "test", f"PYTHON={python}", f"VENV={venv}"]
    with subprocess.Popen(["timeout", "-k", "10", LIMIT, *make]) as process:
        try:
            status = process.wait()
        except BaseException:
            # Whoever stops us stops the run as well: `timeout` hands the signal on to all of it.
            process.terminate()
            raise
    if status:
        print(f"== Python {version}: failed, exit status {status}", flush=True)
    return status == 0


def sum_up(venvs: list[Path]) -> int:
    """Print a line for each environment's last run, then the sum; how many tests failed in all."""
    passed = failed = 0
    reports = [venv / "junit.xml" for venv in venvs if (venv / "junit.xml").exists()]
    for report in sorted(reports, key=lambda path: version_of(path.parent)):
        suite = ET.parse(report).getroot().find("testsuite")
        assert suite is not None
        count = {
            name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        }
        bad = count["failures"] + count["errors"]
        good = count["tests"] - bad - count["skipped"]
        seconds = float(suite.get("time", 0))
        version = ".".join(map(str, version_of(report.parent)))
        print(
            f"Python {version}: {good} passed, {bad} failed, {count['skipped']} skipped"
            f" in {seconds:.0f} s",
        )
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
    parser.add_argument("--only-summary", action="store_true", help="sum up what ran last")
    options = parser.parse_args()
    if options.only_summary:
        return int(sum_up(list(Path().glob(".venv*"))) > 0)
    found = {v: python for v, python in interpreters().items() if v not in options.skip}
    if not found:
        print("No interpreter found.")
        return 1
    results = {version: run(version, python) for version, python in found.items()}
    print("\nRan on:", *(f"{v} ({'passed' if ok else 'FAILED'})" for v, ok in results.items()))
    missing = [v for v in VERSIONS if v not in found and v not in options.skip]
    print("Not found, so not run:", *(missing or ["none"]))
    sum_up([Path(f".venv-{version}") for version in found])
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
