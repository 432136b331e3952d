# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Run the interpreter's own tests of ProcessPoolExecutor against JobserverExecutor.

    python -m cpython.run {fork,spawn,forkserver} REPORT [WORD ...]

Writes one JSON object a line into REPORT: for each test its name without module and start method,
its outcome (ok, skipped, failed) and what there is to say about it.  With words, only the tests
whose name has one of them.  The interpreter must have the package ``test``; nothing of it is
copied.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import re
import sys
import time
import types
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpython import adapter

MODULE = "test.test_concurrent_futures"
# From Python 3.12 on the tests are in several modules.
PARTS = (
    "test_as_completed",
    "test_deadlock",
    "test_init",
    "test_process_pool",
    "test_shutdown",
    "test_wait",
)
#: No single test takes longer than this, a failed machine aside.
LIMIT = 100

# What goes before the programs that the tests run in a new interpreter.  One of them is never run
# with the standard library's pool: it lacks an import, and comes too late to set the start method.
PRELUDE = """\
import functools, multiprocessing, sys
sys.path[:0] = {path!r}
from cpython import adapter
adapter.install()
multiprocessing.set_start_method = functools.partial(multiprocessing.set_start_method, force=True)
"""


def modules() -> list[types.ModuleType]:
    """The interpreter's tests, which must be imported after ``adapter.install``."""
    package = importlib.import_module(MODULE)
    if not hasattr(package, "__path__"):
        return [package]
    return [importlib.import_module(f"{MODULE}.{part}") for part in PARTS]


def mixins(found: list[types.ModuleType]) -> Iterator[type]:
    """The classes that say which executor is tested."""
    for module in found:
        for name in dir(module):
            if re.fullmatch(r"ProcessPool(Fork|Spawn|Forkserver)Mixin", name):
                yield getattr(module, name)


def kill_when_failed(test: Any, name: str) -> None:
    """Have the executor of a test that fails end, though nobody lets its calls go on any more."""
    method = getattr(test, name)

    def run() -> None:
        try:
            method()
        except BaseException:
            if hasattr(test, "executor"):
                test.executor.kill_workers()
            raise

    setattr(test, name, run)


def with_prelude(assert_python_ok: Any) -> Any:
    """Have programs in a new interpreter use our executor, too."""

    def run(*args: str, **environment: str) -> Any:
        *options, source = args
        path = [entry for entry in sys.path if entry]
        return assert_python_ok(*options, PRELUDE.format(path=path) + source, **environment)

    return run


def prepare() -> list[types.ModuleType]:
    """Import the tests, with our executor in place."""
    adapter.install()
    found = modules()
    # Not the very class that `concurrent.futures` has now: a test skips itself for that one.
    twin = type("ProcessPoolExecutor", (adapter.ProcessPoolExecutor,), {})
    for mixin in set(mixins(found)):
        mixin.executor_type = twin  # type: ignore[attr-defined]
    for module in found:
        if hasattr(module, "assert_python_ok"):
            vars(module)["assert_python_ok"] = with_prelude(vars(module)["assert_python_ok"])
    return found


def tests_of(found: list[types.ModuleType], method: str) -> Iterator[tuple[str, unittest.TestCase]]:
    """Names and tests for a start method; those that concern no process pool are left out."""
    pattern = re.compile(f"ProcessPool{method.capitalize()}(?!server)(.*)")
    for module in found:
        suites: Any = unittest.TestLoader().loadTestsFromModule(module)
        for suite in suites:
            for test in suite:
                kind = type(test).__name__
                name = test.id().rpartition(".")[2]
                match = pattern.fullmatch(kind)
                if match:
                    kill_when_failed(test, name)
                    yield f"{match[1]}.{name}", test
                elif kind == "FailingInitializerResourcesTest" and name == f"test_{method}":
                    yield f"{kind}.test", test


class Report(unittest.TestResult):
    """Writes down each outcome at once, so that a hang costs no more than what comes after it."""

    def __init__(self, names: dict[str, str], path: Path) -> None:
        super().__init__()
        self._names = names
        self._path = path
        self._begun = 0.0
        self._said: tuple[str, str] = ("ok", "")

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        self._begun = time.monotonic()
        self._said = ("ok", "")
        self._write(test, "hung", "did not come to an end")

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        if test.id() in self._names:
            self._said = ("failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]
        else:  # setUpModule, tearDownModule
            self._names[test.id()] = test.id()
            self._said = ("failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]
            self._write(test, *self._said)

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._said = ("failed", self._exc_info_to_string(err, test))  # type: ignore[attr-defined]

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._said = ("skipped", reason)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        self._write(test, *self._said)

    def _write(self, test: unittest.TestCase, outcome: str, text: str) -> None:
        line = {
            "name": self._names[test.id()],
            "outcome": outcome,
            "text": text,
            "seconds": round(time.monotonic() - self._begun, 2),
        }
        with self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def main() -> int:
    """Run the tests that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("fork", "spawn", "forkserver"))
    parser.add_argument("report", type=Path)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    suite = unittest.TestSuite()
    names = {}
    for name, test in tests_of(prepare(), options.method):
        if not options.words or any(word in name for word in options.words):
            names[test.id()] = name
            suite.addTest(test)
    suite.run(Report(names, options.report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
