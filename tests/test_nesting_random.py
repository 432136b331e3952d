# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Random trees of nested jobs: no deadlock, no job too many, no slot lost, no result wrong."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import has_ended, wait_until
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from nesting_jobs import SHORT, Account, Grower, Node, every, judge, outcome, size

from jobserver import Blocked, Jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypothesis.strategies import DrawFn

    from jobserver import Future

# Hypothesis looks for references to its own random numbers, and on Python 3.14 at times finds none.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:It looks like `register_random`:hypothesis.errors.HypothesisWarning"
    ),
    pytest.mark.fresh("waits for workers to end"),
]

#: Seconds without any news from any job, each of which takes milliseconds: a deadlock.
STALL = 15.0

#: No shrinking: a deadlock costs STALL each time that it is met again.
COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

ENDS = ("value", "value", "value", "value", "value", "raise", "kill", "orphan", "exit")
GOOD_ENDS = ("value", "value", "value", "raise", "orphan")
WAITS = ("result", "result", "wait", "done", "timed", "dropped")
TIMEOUTS = (None, None, None, None, SHORT, 0)


@st.composite
def trees(draw: DrawFn, most: int = 12, deepest: int = 4) -> Node:
    """Up to ``most`` jobs of any shape, up to ``deepest`` levels below the first."""
    count = draw(st.integers(1, most))
    depths = [0]
    kids: list[list[int]] = [[]]
    followers: dict[int, int] = {}
    orders = [draw(st.sampled_from(("batch", "chain", "map")))]
    parents = [0]
    for name in range(1, count):
        above = draw(st.sampled_from([n for n in range(name) if depths[n] < deepest]))
        # What a callback submits: after a job that was submitted by hand, and has no callback yet.
        free = [n for n in kids[above] if n not in followers and orders[above] != "map"]
        if free and draw(st.integers(0, 3)) == 0:
            followers[draw(st.sampled_from(free))] = name
        else:
            kids[above].append(name)
        parents.append(above)
        depths.append(depths[above] + 1)
        kids.append([])
        orders.append(draw(st.sampled_from(("batch", "batch", "chain", "map"))))

    def build(name: int, mapped: bool) -> Node:
        follower = followers.get(name)
        return Node(
            name,
            tuple(build(kid, orders[name] == "map") for kid in kids[name]),
            consume=1 if mapped else draw(st.sampled_from((1, 1, 1, 0))),
            submit_timeout=None if mapped else draw(st.sampled_from(TIMEOUTS)),
            lend=draw(st.booleans()),
            wait=draw(st.sampled_from(WAITS)),
            callback=None if follower is None else build(follower, False),
            order=orders[name],
            # What is outstanding when an iteration ends early is not in the account, so the job
            # must not be killed before it has waited for it.
            end=draw(st.sampled_from(ENDS if orders[name] != "map" else GOOD_ENDS)),
        )

    return build(0, False)


def grow(method: str, slots: int, roots: list[Node]) -> None:
    """Run trees side by side, and look at all that can be known of it."""
    note(f"{slots} slots, {method}: {roots}")
    directory = tempfile.mkdtemp()
    try:
        account = Account(Path(directory, "account"))
        with Jobserver(method, slots) as js:
            _run(js, account, roots)
            _look(js, slots, account, roots)
    finally:
        shutil.rmtree(directory)


def _run(js: Jobserver, account: Account, roots: list[Node]) -> None:
    grower = Grower(js, account)
    futures: list[Future[Any]] = []
    with _killed_if_stuck(account) as still_moving:
        for root in roots:
            while len(futures) < roots.index(root) + 1:
                with contextlib.suppress(Blocked):
                    futures.append(js.submit(grower, args=(root,), consume=root.consume, timeout=1))
                still_moving()
        for future in futures:
            while not future.done(1):
                still_moving()
    for root, future in zip(roots, futures):
        judge(root, outcome(future, 0), account)


@contextlib.contextmanager
def _killed_if_stuck(account: Account) -> Iterator[Callable[[], None]]:
    """Yields what raises when there has been no news for too long; then nothing is left running."""
    news, since = 0, time.monotonic()

    def still_moving() -> None:
        nonlocal news, since
        if len(account.lines()) > news:
            news, since = len(account.lines()), time.monotonic()
        if time.monotonic() - since > STALL:
            raise AssertionError(f"nothing has happened for {STALL} s\n{_stacks(account)}")

    try:
        yield still_moving
    except BaseException:
        _kill(account)
        raise


def _look(js: Jobserver, slots: int, account: Account, roots: list[Node]) -> None:
    pool = js._shared.slots
    if not any(node.end in ("kill", "orphan", "exit") for root in roots for node in every(root)):
        # Nobody was killed: every slot is back the moment that the last result is there.
        assert pool.free() == slots
    account.await_ends()
    # What a killed job held is back as soon as somebody looks.
    pool.sweep()
    assert pool.free() == slots
    assert account.peak() <= slots
    starts = account.events("start")
    assert sorted(starts) == sorted(set(starts)), "a job ran twice"
    assert sorted(starts) == sorted(account.events("end"))


def _stacks(account: Account) -> str:
    """Ask every job where it stands."""
    asked = [pid for pid in account.pids() if not has_ended(pid)]
    for pid in asked:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    text = [Path(account.path).read_text()]
    for pid in asked:
        stack = Path(f"{account.path}.stack.{pid}")
        with contextlib.suppress(AssertionError):
            wait_until(lambda stack=stack: stack.exists() and stack.stat().st_size)  # type: ignore[misc]
        text.append(f"-- {pid}:\n{stack.read_text() if stack.exists() else '?'}")
    assert glob.glob(f"{account.path}.stack.*")
    return "\n".join(text)


def _kill(account: Account) -> None:
    for pid in account.pids():
        if not has_ended(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.contract("N3", "N5", "H6", "H7", "F25", "F12")
@pytest.mark.parametrize("slots", [1, 2, 3])
@settings(max_examples=25, derandomize=True, **COMMON)
@given(root=trees())
def test_random_trees_fork(slots: int, root: Node) -> None:
    """Whatever the tree: no deadlock, not more jobs than slots, each result once and right."""
    grow("fork", slots, [root])


@pytest.mark.contract("N3", "N5", "H6")
@pytest.mark.parametrize("slots", [1, 2, 3])
@settings(max_examples=10, derandomize=True, **COMMON)
@given(root=trees())
def test_random_trees_forkserver(slots: int, root: Node) -> None:
    """The same through the zygote."""
    grow("forkserver", slots, [root])


@pytest.mark.contract("N3", "N5", "H6")
@pytest.mark.parametrize("slots", [1, 2, 3])
@settings(max_examples=2, derandomize=True, **COMMON)
@given(root=trees(most=4, deepest=2))
def test_random_trees_spawn(slots: int, root: Node) -> None:
    """The same with interpreters of their own; few, since each takes its time to start."""
    grow("spawn", slots, [root])


@pytest.mark.contract("N3", "N5")
@pytest.mark.parametrize("slots", [1, 2, 3])
@settings(max_examples=8, derandomize=True, **COMMON)
@given(roots=st.lists(trees(most=6), min_size=2, max_size=4))
def test_random_forests(slots: int, roots: list[Node]) -> None:
    """Several trees that compete for the same slots."""
    renamed = [_renamed(root, 100 * number) for number, root in enumerate(roots)]
    grow("fork", slots, renamed)


def _renamed(node: Node, by: int) -> Node:
    return node._replace(
        name=node.name + by,
        kids=tuple(_renamed(kid, by) for kid in node.kids),
        callback=None if node.callback is None else _renamed(node.callback, by),
    )


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize(
    ("method", "examples", "most"), [("fork", 300, 20), ("forkserver", 150, 20), ("spawn", 20, 6)]
)
def test_many_random_trees(method: str, examples: int, most: int, slots: int) -> None:
    """Other trees each time, and larger ones."""

    @settings(max_examples=examples, **COMMON)
    @given(root=trees(most=most, deepest=6))
    def check(root: Node) -> None:
        grow(method, slots, [root])

    check()


def test_trees_are_varied() -> None:
    """The strategy makes what these tests are about: width, and each kind of everything."""
    seen: set[Any] = set()

    @settings(max_examples=100, derandomize=True, **COMMON)
    @given(root=trees())
    def look(root: Node) -> None:
        seen.add(("size", size(root)))
        for node in every(root):
            seen.update((node.wait, node.order, node.end))
            seen.update((("consume", node.consume), ("lend", node.lend)))
            seen.add(("timeout", node.submit_timeout))
            seen.add(("kids", len(node.kids)))
            seen.add(("callback", node.callback is not None))

    look()

    wanted: set[Any] = {*WAITS, *ENDS, "batch", "chain", "map", ("callback", True)}
    wanted |= {("consume", 0), ("consume", 1), ("lend", False), ("lend", True)}
    wanted |= {("timeout", timeout) for timeout in TIMEOUTS} | {("size", 12), ("kids", 4)}
    assert wanted <= seen
