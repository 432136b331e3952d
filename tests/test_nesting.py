# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Nesting: what a job holds, when it lends, and that no shape of tree ever stops moving."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    METHODS,
    PATIENCE,
    Gate,
    await_end,
    free_slots,
    identity,
    nothing,
    wait_until,
)
from nesting_jobs import (
    Account,
    Turnstile,
    branch,
    callback_submits,
    chain,
    fan,
    kill_a_borrower,
    leave_two_children,
    shape,
    slots_seen,
    submit_from_threads,
    submit_then_pass,
    wait_for_child,
    wait_for_killed_child,
)

from jobserver import Blocked, Jobserver

if TYPE_CHECKING:
    from pathlib import Path

WAYS = ("result", "wait", "done", "map")


@pytest.fixture
def account(tmp_path: Path) -> Account:
    """Notes which jobs run when."""
    return Account(tmp_path / "account")


@pytest.fixture
def turnstile(tmp_path: Path) -> Turnstile:
    """Where jobs stand until the test lets them through."""
    directory = tmp_path / "turnstile"
    directory.mkdir()
    return Turnstile(directory)


def conserved(js: Jobserver) -> bool:
    """Whether every slot is free, at this very instant."""
    return js._shared.slots.free() == js._shared.slots.slots


def recovered(js: Jobserver) -> bool:
    """Whether every slot is free, those of the dead put back; true once the dead are gone."""
    js._shared.slots.sweep()
    return conserved(js)


def refused(js: Jobserver) -> bool:
    """Whether there is no slot."""
    try:
        js.submit(nothing, timeout=0).result(PATIENCE)
    except Blocked:
        return True
    return False


# What a job holds


@pytest.mark.contract("N1")
@pytest.mark.parametrize("how", WAYS)
def test_waiting_job_holds_its_slot(turnstile: Turnstile, how: str) -> None:
    """Without lend a job keeps its slot while it waits for its child, however it waits."""
    with Jobserver("fork", 2) as js:
        parent = js.submit(wait_for_child, args=(js, turnstile, how, None))
        wait_until(turnstile.inside)

        # Long enough for the parent to be inside its wait, whatever that would lead to.
        assert not parent.done(0.05)
        assert refused(js)

        turnstile.let("child")
        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"
        assert conserved(js)


@pytest.mark.contract("N1", "S5")
def test_job_without_slot_holds_none(method: str, turnstile: Turnstile) -> None:
    """A consume=0 job holds no slot, neither while it runs nor while it waits."""
    with Jobserver(method, 1) as js:
        parent = js.submit(wait_for_child, args=(js, turnstile, "result", None), consume=0)
        wait_until(turnstile.inside)
        assert refused(js)
        turnstile.let("child")
        wait_until(lambda: turnstile.inside() == ["parent"])

        assert not refused(js)

        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"


@pytest.mark.contract("N2")
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_depth_is_bounded_by_slots_without_waiting(
    method: str, slots: int, account: Account
) -> None:
    """With timeout=0, n slots nest n - 1 levels deep, and the next submit raises Blocked."""
    with Jobserver(method, slots) as js:
        assert js.submit(chain, args=(js, account, slots + 3, 0)).result(PATIENCE) == slots - 1
        assert conserved(js)


@pytest.mark.contract("N2")
def test_depth_is_reached_without_waiting(account: Account) -> None:
    """With timeout=0, d + 1 slots are enough for depth d."""
    with Jobserver("fork", 5) as js:
        assert js.submit(chain, args=(js, account, 4, 0)).result(PATIENCE) == 4


@pytest.mark.contract("N1", "H7")
def test_job_sees_the_slots_that_are_left(method: str) -> None:
    """Inside a job, all slots but its own are free."""
    with Jobserver(method, 3) as js:
        assert js.submit(slots_seen, args=(js,)).result(PATIENCE) == 2


# Lending in submit


@pytest.mark.contract("N3", "N5")
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("lend", [False, True])
def test_chain_deeper_than_slots(method: str, slots: int, lend: bool, account: Account) -> None:
    """A blocking submit nests to any depth, on any number of slots."""
    depth = 4 if method == "spawn" else 12
    with Jobserver(method, slots, lend=lend) as js:
        assert js.submit(chain, args=(js, account, depth, None)).result(PATIENCE) == depth
        assert conserved(js)
    assert account.peak() <= slots


@pytest.mark.contract("N3", "N5")
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("lend", [False, True])
def test_full_tree(slots: int, lend: bool, account: Account) -> None:
    """A job may submit more children than there are slots, at every level."""
    with Jobserver("fork", slots, lend=lend) as js:
        assert js.submit(fan, args=(js, account, 3, 3)).result(PATIENCE) == 40
        assert conserved(js)
    assert account.peak() <= slots


@pytest.mark.contract("N4")
def test_submit_returns_when_the_job_holds_a_slot(method: str, turnstile: Turnstile) -> None:
    """On one slot, submit returns in a job only when the child that borrowed it has ended."""
    with Jobserver(method, 1) as js:
        parent = js.submit(submit_then_pass, args=(js, turnstile))
        wait_until(turnstile.inside)
        assert not parent.done(0.05)
        assert turnstile.inside() == ["child"]
        turnstile.let("child")
        turnstile.let("parent")

        assert parent.result(PATIENCE) is True


@pytest.mark.contract("N4")
def test_submit_returns_with_any_slot(method: str, turnstile: Turnstile) -> None:
    """A job that has lent goes on as soon as any slot is free, while its child still runs."""
    with Jobserver(method, 2) as js:
        other = js.submit(turnstile.enter, args=("other",))
        wait_until(turnstile.inside)
        parent = js.submit(submit_then_pass, args=(js, turnstile))
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "other"])
        turnstile.let("other")
        assert other.result(PATIENCE) == "other"
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "parent"])
        assert refused(js)
        turnstile.let("child")
        turnstile.let("parent")

        assert parent.result(PATIENCE) is False
        assert conserved(js)


@pytest.mark.contract("N4", "F17")
def test_callback_in_a_job_on_one_slot(method: str) -> None:
    """In a job on the only slot, a callback may submit, and so may the job that it submits."""
    with Jobserver(method, 1) as js:
        assert js.submit(callback_submits, args=(js,)).result(PATIENCE) == [["called"]]


@pytest.mark.contract("N3", "H13")
@pytest.mark.parametrize("lend", [False, True])
def test_threads_of_one_job_submit(method: str, lend: bool) -> None:
    """Several threads of one job may be blocked in submit at once: each gets its turn."""
    with Jobserver(method, 1, lend=lend) as js:
        found = js.submit(submit_from_threads, args=(js, 3, identity, (5,))).result(PATIENCE)
        assert found == [5, 5, 5]
        assert conserved(js)


# Lending while waiting


@pytest.mark.contract("N6", "N7")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_lending_job_lends_while_it_waits(method: str, how: str, turnstile: Turnstile) -> None:
    """With lend a waiting job's slot is another's, and the job goes on with its child's."""
    if method == "spawn" and how != "result":
        pytest.skip("the same code, and slow to start")
    with Jobserver(method, 2, lend=True) as js:
        parent = js.submit(wait_for_child, args=(js, turnstile, how, None))
        wait_until(lambda: turnstile.inside() == ["child"])
        other = js.submit(turnstile.enter, args=("other",), timeout=PATIENCE)
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "other"])
        assert refused(js)

        # The other keeps its slot: there is no slot for the parent but its child's.
        turnstile.let("child")
        wait_until(lambda: sorted(turnstile.inside()) == ["other", "parent"])
        assert refused(js)

        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"
        turnstile.let("other")
        assert other.result(PATIENCE) == "other"
        assert conserved(js)


@pytest.mark.contract("N6", "H1")
def test_lend_is_a_matter_of_the_handle(turnstile: Turnstile) -> None:
    """Whether a job lends depends on the handle that it has submitted the child through."""
    with Jobserver("fork", 2, lend=True) as js:
        stingy = js.replace(lend=False)
        parent = js.submit(wait_for_child, args=(stingy, turnstile, "result", None))
        wait_until(turnstile.inside)
        assert not parent.done(0.05)
        assert refused(js)
        turnstile.let("child")
        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"


@pytest.mark.contract("N6")
def test_job_lends_at_its_end(turnstile: Turnstile) -> None:
    """With lend a job whose function has returned lends while its last child runs."""
    with Jobserver("fork", 2, lend=True) as js:
        parent = js.submit(wait_for_child, args=(js, turnstile, "end", None))
        wait_until(turnstile.inside)
        other = js.submit(turnstile.enter, args=("other",), timeout=PATIENCE)
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "other"])
        turnstile.let("child")

        assert parent.result(PATIENCE) == "ended"

        turnstile.let("other")
        assert other.result(PATIENCE) == "other"
        assert conserved(js)


@pytest.mark.contract("N6", "N8")
def test_job_lends_all_that_comes_back_at_its_end(turnstile: Turnstile) -> None:
    """With lend a job at its end keeps no slot idle while any child of it still runs."""
    with Jobserver("fork", 3, lend=True) as js:
        parent = js.submit(leave_two_children, args=(js, turnstile))
        wait_until(lambda: sorted(turnstile.inside()) == ["first", "second"])
        futures = [js.submit(turnstile.enter, args=("one",), timeout=PATIENCE)]
        wait_until(lambda: sorted(turnstile.inside()) == ["first", "one", "second"])
        turnstile.let("first")

        futures.append(js.submit(turnstile.enter, args=("two",), timeout=PATIENCE))

        wait_until(lambda: sorted(turnstile.inside()) == ["one", "second", "two"])
        assert refused(js)
        for name in ("second", "one", "two"):
            turnstile.let(name)
        assert parent.result(PATIENCE) is None
        assert [future.result(PATIENCE) for future in futures] == ["one", "two"]
        assert conserved(js)


@pytest.mark.contract("N7")
def test_lending_job_waits_for_a_slot_after_a_death(method: str, turnstile: Turnstile) -> None:
    """A job whose child was killed goes on with a slot, too, and not more jobs run than slots."""
    with Jobserver(method, 2, lend=True) as js:
        parent = js.submit(wait_for_killed_child, args=(js, turnstile))
        wait_until(turnstile.inside)
        other = js.submit(turnstile.enter, args=("other",), timeout=PATIENCE)
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "other"])
        os.kill(turnstile.pid("child"), signal.SIGKILL)
        wait_until(lambda: sorted(turnstile.inside()) == ["child", "other", "parent"])
        assert refused(js)
        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"
        turnstile.let("other")
        assert other.result(PATIENCE) == "other"
        wait_until(lambda: recovered(js), "the slots of the dead")


@pytest.mark.contract("N9")
@pytest.mark.parametrize("how", WAYS)
def test_wait_with_a_timeout_does_not_lend(turnstile: Turnstile, how: str) -> None:
    """With lend, too, a job keeps its slot in a wait that may end before the child does."""
    with Jobserver("fork", 2, lend=True) as js:
        parent = js.submit(wait_for_child, args=(js, turnstile, how, PATIENCE))
        wait_until(turnstile.inside)
        assert not parent.done(0.05)
        assert refused(js)
        turnstile.let("child")
        turnstile.let("parent")
        assert parent.result(PATIENCE) == "went on"


# Every slot is busy


@pytest.mark.contract("N8", "N6")
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("how", WAYS)
def test_every_slot_is_busy_with_work(slots: int, how: str, turnstile: Turnstile) -> None:
    """With lend there are always as many leaves at work as there are slots.

    No clock: no leaf is let go before all slots are busy, so a slot that waits stops the test.
    """
    _pass_leaves("fork", slots, how, turnstile, width=3, depth=2)


@pytest.mark.contract("N8")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_slot_is_busy_in_other_start_methods(method: str, turnstile: Turnstile) -> None:
    """The same for workers that are not forked."""
    _pass_leaves(method, 2, "result", turnstile, width=2, depth=2)


@pytest.mark.contract("N8")
@pytest.mark.parametrize("how", ["result", "map"])
def test_every_slot_is_busy_in_deep_recursion(how: str, turnstile: Turnstile) -> None:
    """Depth makes no difference."""
    _pass_leaves("fork", 2, how, turnstile, width=2, depth=5)


def _pass_leaves(
    method: str, slots: int, how: str, turnstile: Turnstile, width: int, depth: int
) -> None:
    leaves = width**depth
    with Jobserver(method, slots, lend=True) as js:
        root = js.submit(branch, args=(js, turnstile, width, depth, how, "leaf"))
        for gone in range(leaves):
            busy = min(slots, leaves - gone)
            wait_until(lambda busy=busy: len(turnstile.inside()) >= busy, f"{busy} leaves at work")  # type: ignore[misc]
            inside = turnstile.inside()
            assert len(inside) == busy
            turnstile.let(min(inside))
        assert root.result(PATIENCE) == leaves
        assert turnstile.been() == leaves
        assert conserved(js)


# Shapes that have stopped moving once


SHAPES: dict[str, tuple[Any, ...]] = {
    # A job lends for the sake of one without a slot, far below: nobody above may keep that slot.
    "without a slot below two lenders": (
        "a",
        1,
        [("b", 1, [("c", 0, [("d", 1, [])])])],
    ),
    "without slots, in a row": ("a", 1, [("b", 0, [("c", 0, [("d", 0, [("e", 1, [])])])])]),
    "without a slot at the top": ("a", 0, [("b", 1, [("c", 0, [("d", 1, [])])])]),
    "two without a slot": (
        "a",
        1,
        [("b", 0, [("c", 1, []), ("d", 1, [])]), ("e", 0, [("f", 1, [("g", 1, [])])])],
    ),
    "killed at the end of a chain": ("a", 1, [("b", 1, [("c", 1, [], "kill")])]),
    "killed in the middle": ("a", 1, [("b", 1, [("c", 1, [("d", 1, [])], "kill")])]),
    "killed without a slot": ("a", 1, [("b", 1, [("c", 0, [("d", 1, [])], "kill"), ("e", 1, [])])]),
    "killed everywhere": (
        "a",
        1,
        [
            ("b", 1, [("c", 1, [], "kill"), ("d", 1, [], "kill")], "kill"),
            ("e", 1, [("f", 0, [("g", 1, [], "kill")], "kill")]),
            ("h", 1, []),
        ],
    ),
}


def _said(tree: tuple[Any, ...]) -> str:
    if len(tree) > 3:
        return "died -9"
    return f"{tree[0]}({','.join(_said(kid) for kid in tree[2])})"


@pytest.mark.contract("N3", "F25")
@pytest.mark.parametrize("lend", [False, True])
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("tree", SHAPES.values(), ids=SHAPES)
def test_shapes(tree: tuple[Any, ...], slots: int, lend: bool) -> None:
    """No shape of tree deadlocks, with jobs that hold no slot and with jobs that are killed."""
    with Jobserver("fork", slots, lend=lend) as js:
        root = js.submit(shape, args=(js, tree), consume=tree[1])
        assert root.done(PATIENCE)
        assert root.result(0) == _said(tree)
        wait_until(lambda: recovered(js), "the slots of the dead")


@pytest.mark.contract("N3")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("name", ["without a slot below two lenders", "killed in the middle"])
def test_shapes_in_other_start_methods(method: str, name: str) -> None:
    """The same for workers that are not forked."""
    tree = SHAPES[name]
    with Jobserver(method, 1) as js:
        assert js.submit(shape, args=(js, tree)).result(PATIENCE) == _said(tree)


@pytest.mark.contract("N3", "S18")
def test_borrower_is_killed(method: str) -> None:
    """A job gets its slot back from a child that was killed on it, again and again."""
    with Jobserver(method, 1) as js:
        root = js.submit(kill_a_borrower, args=(js,))
        assert root.result(PATIENCE) == [-9, -9, -9, 3]
        assert conserved(js)


@pytest.mark.contract("N3", "N5")
def test_freed_slot_amid_a_chain_of_lenders(account: Account, gate: Gate) -> None:
    """Slots that come free amid a chain of lenders never starve those at its end."""
    with Jobserver("fork", 2) as js:
        for _ in range(5):
            other = js.submit(gate.enter)
            root = js.submit(chain, args=(js, account, 7, None))
            gate.open()
            assert root.result(PATIENCE) == 7
            assert other.result(PATIENCE)
        assert conserved(js)
    assert account.peak() <= 2


@pytest.mark.contract("N5", "N3", "H13")
def test_trees_from_many_threads(account: Account) -> None:
    """Trees submitted by several threads at once stay within the slots together."""
    with Jobserver("fork", 3) as js:
        found = submit_from_threads(js, 6, fan, (js, account, 2, 2))
        assert found == [7] * 6
        assert conserved(js)
    assert account.peak() <= 3


@pytest.mark.contract("N3", "S18", "F26")
def test_killed_parent_leaves_its_children_running(method: str, turnstile: Turnstile) -> None:
    """A slot lent by a job that is killed is taken while its child lives, and free after."""
    with Jobserver(method, 1) as js:
        parent = js.submit(submit_then_pass, args=(js, turnstile))
        wait_until(turnstile.inside)
        parent.wait(signal=signal.SIGKILL)
        assert refused(js)
        turnstile.let("child")

        # Nobody is told that an orphan has ended: who waits for a slot finds out.
        assert js.submit(identity, args=(1,), timeout=PATIENCE).result(PATIENCE) == 1
        assert conserved(js)


@pytest.mark.contract("H6", "N5")
def test_all_slots_are_there_afterwards(method: str, gate: Gate, account: Account) -> None:
    """After nested work as many jobs can run at once as before."""
    with Jobserver(method, 2, lend=True) as js:
        js.submit(fan, args=(js, account, 2, 2)).result(PATIENCE)
        assert free_slots(js, gate) == 2
    await_end(max(account.pids()))
