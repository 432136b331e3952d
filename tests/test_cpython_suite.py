# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""CPython's own tests of ProcessPoolExecutor, run against JobserverExecutor, case by case.

The tests come from the running interpreter, at run time; where it came without its package
``test`` there is nothing to run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cpython.differences import DIFFERENCES, SKIPS, differing
from helpers import METHODS, program_environment, session_members

#: The tests of each group run one after the other, the groups side by side: most tests sleep.
GROUPS = (
    ("WaitTest", "InitializerTest", "InitializerResourcesTest"),
    ("ProcessPoolExecutorTest", "AsCompletedTest"),
    ("ExecutorDeadlockTest",),
    ("ShutdownTest",),
)
#: Seconds for all tests of one start method, on a machine that has much else to do.
LIMIT = 400

try:
    HERE = importlib.util.find_spec("test.test_concurrent_futures") is not None
except ImportError:
    HERE = False

pytestmark = pytest.mark.skipif(
    not HERE, reason="this interpreter came without its tests (test.test_concurrent_futures)"
)


@contextlib.contextmanager
def running(method: str, words: tuple[str, ...], report: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run some of the tests in an interpreter of their own; at the end nothing of it is left."""
    command = [sys.executable, "-m", "cpython.run", method, str(report), *words]
    with report.with_suffix(".out").open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=program_environment(),
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in session_members(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def outcomes(method: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Run all tests with a start method; what became of each."""
    end = time.monotonic() + LIMIT
    reports = [directory / f"{number}.json" for number in range(len(GROUPS))]
    with contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(running(method, words, report))
            for words, report in zip(GROUPS, reports)
        ]
        for group in groups:
            with contextlib.suppress(subprocess.TimeoutExpired):
                group.wait(max(0.0, end - time.monotonic()))
    found = {}
    for report in reports:
        assert report.exists(), report.with_suffix(".out").read_text()
        for line in report.read_text().splitlines():
            said = json.loads(line)
            found[said["name"]] = said
    return found


@pytest.mark.contract("E5", "E6", "E7")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method == "forkserver" else pytest.mark.slow)
        for method in METHODS
    ],
)
def test_standard_librarys_tests(method: str, tmp_path: Path) -> None:
    """Each test of the standard library passes, but for those that differ by design."""
    found = outcomes(method, tmp_path)
    differ = differing(method)

    assert len(found) > 50
    failed = {name: said["text"] for name, said in found.items() if said["outcome"] == "failed"}
    hung = [name for name, said in found.items() if said["outcome"] == "hung"]
    skipped = {name: said["text"] for name, said in found.items() if said["outcome"] == "skipped"}
    unexpected = "\n\n".join(f"{name}: {failed[name]}" for name in sorted(failed.keys() - differ))
    assert not unexpected, unexpected
    assert hung == []
    assert {name: why for name, why in skipped.items() if why not in SKIPS} == {}
    passed = found.keys() - failed.keys() - skipped.keys()
    assert sorted(passed & differ.keys()) == [], "these are said to differ, and pass"


def test_every_difference_is_explained() -> None:
    """The page about CPython's tests names each case that differs."""
    page = Path(__file__).parent.parent / "docs" / "cpython-suite.md"
    text = page.read_text(encoding="utf-8")

    missing = [name for name in DIFFERENCES if f"`{name.rpartition('.')[2]}`" not in text]
    assert missing == []
