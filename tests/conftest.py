# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Fixtures for all tests: start methods, a gate for jobs, and a check that nothing leaks."""

from __future__ import annotations

import faulthandler
import gc
import itertools
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# The tests are not a package: workers find the job functions as the module `helpers`, so the path
# must hold before it is imported, here and, handed down by the start methods, there.
sys.path.insert(0, str(Path(__file__).parent))

from helpers import METHODS, Gate, descendants, nothing, open_fds

from jobserver._forking import books_lock

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

# A test run that was itself started by make must not join make's pool.
for _name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):
    os.environ.pop(_name, None)

# Nor is it to begin deaf to Ctrl-C, as what a shell starts in the background does: programs that
# the tests start would be so, too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: Seconds that processes and descriptors get to vanish after a test.
GRACE = 5.0

#: Seconds after which a test hangs, on a machine that has much else to do; those of a slow one.
LIMIT, SLOW_LIMIT = 300.0, 3600.0

_tests = itertools.count()
_FAILED = pytest.StashKey[bool]()
_STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow, for tests that need minutes or gigabytes."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--kills", type=int, default=5000, help="how many, in the slow test of chaos")
    parser.addoption("--warm", action="store_true", help="let workers run any number of jobs")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marks that these tests use."""
    config.addinivalue_line("markers", "contract(*ids): clauses of docs/contract.md guarded")
    config.addinivalue_line("markers", "slow: needs minutes or gigabytes; run with --slow")
    config.addinivalue_line("markers", "fresh(why): about a process for each job, also with --warm")
    # Python 3.12 and later warn about each fork of a process with threads. Forking with threads
    # is what several tests are about.
    config.addinivalue_line(
        "filterwarnings", "ignore:.*multi-threaded, use of fork:DeprecationWarning"
    )
    config.stash[_STDERR] = os.dup(2)  # capturing replaces it
    # How long an example takes depends on what else the machine does. All else stays as chosen.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_STDERR])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the whole run, with a traceback of every thread, when a test hangs."""
    limit = SLOW_LIMIT if item.get_closest_marker("slow") else LIMIT
    # Its thread blocks all signals, but not before it first runs: until then one that a test sends
    # to this process, while the main thread has it wait, could go astray there.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[_STDERR])
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests unless --slow or an explicit -m asks for them."""
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def tasks_per_child(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --warm, workers run any number of jobs, but in tests that are about fresh ones."""
    if not request.config.getoption("--warm") or request.node.get_closest_marker("fresh"):
        yield
        return
    from jobserver import Jobserver

    defaults = Jobserver.__init__.__kwdefaults__
    assert defaults is not None
    defaults["max_tasks_per_child"] = None
    yield
    defaults["max_tasks_per_child"] = 1


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """Each start method in turn."""
    name: str = request.param
    return name


@pytest.fixture
def make_gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Gate]]:
    """Makes gates for jobs, open at the latest when the test ends."""
    gates: list[Gate] = []

    def make() -> Gate:
        gates.append(Gate(tmp_path_factory.mktemp("gate")))
        return gates[-1]

    yield make
    for gate in gates:
        gate.open()


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    """A gate for jobs, open at the latest when the test ends."""
    return make_gate()


@pytest.fixture(scope="session")
def warm() -> None:
    """Start what the library and multiprocessing keep for the life of a process.

    After this the numbers of descriptors and children are the same before and after each test.
    """
    from jobserver import Jobserver

    multiprocessing.resource_tracker.ensure_running()
    # The first shared value opens an arena that multiprocessing keeps.
    multiprocessing.get_context("spawn").Value("i", 0)
    for name in METHODS:
        with Jobserver(name, 1) as js:
            js.submit(nothing).result()
        del js
    _start_hypothesis()


def _set_aside() -> None:
    """Collect, and have later collections look at later objects only.

    Most of what is there by then are reports of earlier tests: thousands of collections that look
    at all of them would take longer than many a test.
    """
    if next(_tests) % 100 == 0:
        gc.unfreeze()  # what was in use then may be garbage now
    gc.collect()
    gc.freeze()


def _start_hypothesis() -> None:
    """Let Hypothesis make and register its source of randomness.

    With the first test that is to be reproducible, as all are where CI is set, it looks for who
    refers to that object, and warns if nobody does. The collector finds nobody among what it has
    been told to freeze, where Hypothesis' place for it may already be.
    """

    @settings(max_examples=1, database=None)
    @given(st.none())
    def first(_: None) -> None:
        pass

    first()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test itself failed: its frames then keep alive what they hold."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


def _is_held(lock: Any) -> bool:
    """Whether somebody holds a re-entrant lock, be it this thread."""
    if lock._is_owned() or not lock.acquire(blocking=False):
        return True
    lock.release()
    return False


class _State:
    """Descriptors, descendants, threads and the lock of the books at one moment."""

    def __init__(self) -> None:
        self.fds: dict[int, str] = open_fds()
        self.processes: dict[int, str] = descendants()
        self.threads = set(threading.enumerate())
        self.locked = _is_held(books_lock())

    def surplus(self, before: _State) -> list[str]:
        """What is here and was not before, in words."""
        found = [
            f"descriptor {fd}: {what}"
            for fd, what in self.fds.items()
            if before.fds.get(fd) != what
        ]
        if len(self.fds) <= len(before.fds):
            # Renumbered or replaced, such as a process that was started again: not a leak.
            found.clear()
        found += [
            f"process {pid} in state {state}"
            for pid, state in self.processes.items()
            if pid not in before.processes
        ]
        found += [f"{thread}" for thread in self.threads - before.threads]
        if self.locked:
            found.append("the lock that is held around every fork, held")
        return found


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, warm: None) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a process or a thread behind."""
    _set_aside()
    before = _State()
    yield
    if request.node.stash.get(_FAILED, False):
        return
    from jobserver import Jobserver

    deadline = time.monotonic() + GRACE
    while True:
        gc.collect()
        surplus = _State().surplus(before)
        if not surplus:
            return
        if time.monotonic() > deadline:
            break
        # What a dropped Jobserver leaves is reaped with the next one that is made.
        Jobserver("fork", 1)
        time.sleep(0.01)
    pytest.fail("left behind:\n  " + "\n  ".join(surplus))


#: Python 3.12.0 and 3.12.1 refuse to fork as soon as the program has begun to end, before its
#: threads have been waited for (python/cpython#113964): what is pending then cannot be started.
CANNOT_FORK_AT_EXIT = sys.version_info[:2] == (3, 12) and sys.version_info[2] < 2
STARTS_AT_EXIT = (
    "test_exit_finishes_what_is_pending[fork]",
    "test_exit_after",
    "test_exit_with_a_shared_jobserver",
    "test_exit_in_a_thread_that_shuts_down",
    "test_jobs_finish_when_the_program_ends[submit]",
)


@pytest.hookimpl(trylast=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    if CANNOT_FORK_AT_EXIT and item.name.startswith(STARTS_AT_EXIT):
        item.add_marker(pytest.mark.skip(reason="this Python cannot fork at exit (gh-113964)"))
