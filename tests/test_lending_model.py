# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The rules of lending cannot deadlock: every state of every small tree of jobs, visited."""

from __future__ import annotations

import importlib
import inspect
from itertools import product
from typing import Any

import pytest
from lending_model import (
    RULES,
    Broken,
    Found,
    Job,
    Model,
    Rules,
    explore,
    forests,
    programs,
    show,
)

STYLES = ("batch", "chain", "map", "drop")


def jobs_of(
    parents: tuple[int, ...],
    consumes: tuple[int, ...] = (),
    style: str = "batch",
    lend: bool = False,
) -> tuple[Job, ...]:
    """One program, given as the parent of each job."""
    wanted = consumes or (1,) * len(parents)
    for jobs in programs(parents, (style,)):
        if tuple(job.consume for job in jobs[1:]) == wanted and jobs[0].lend is lend:
            return jobs
    raise AssertionError("no such program")


def assert_never_stuck(jobs: tuple[Job, ...], slots: int, kills: int) -> Found:
    """Explore, and tell the way to the first state from which nothing goes on."""
    found = explore(Model(jobs, slots, kills=kills))
    if found.stuck is not None:
        pytest.fail(f"{slots} slots, {jobs}\n{show(found.stuck)}")
    assert not found.endless
    assert found.final
    return found


@pytest.mark.contract("N3", "N4", "N5", "N6", "N7")
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_up_to_two_jobs_with_any_kills(style: str, slots: int) -> None:
    """Up to two jobs of any kind, each killed anywhere or not: never stuck, no token lost."""
    for count in (1, 2):
        for parents in forests(count):
            for jobs in programs(parents, (style,)):
                assert_never_stuck(jobs, slots, kills=count)


@pytest.mark.contract("N3", "N4", "N5", "N6", "N7")
@pytest.mark.parametrize("slots", [1, 2])
def test_three_jobs(slots: int) -> None:
    """Every forest of three jobs, which all, or some, hold slots: never stuck."""
    for parents in forests(3):
        for jobs in programs(parents, ("batch", "map")):
            assert_never_stuck(jobs, slots, kills=0)


@pytest.mark.contract("N3", "N5")
@pytest.mark.parametrize("parents", [(0, 1, 2), (0, 1, 1)], ids=str)
def test_three_jobs_with_a_kill(parents: tuple[int, ...]) -> None:
    """Three jobs on one slot, one of them killed anywhere: never stuck."""
    for jobs in programs(parents, ("batch",)):
        assert_never_stuck(jobs, 1, kills=1)


#: Trees on which an earlier set of rules has deadlocked: parents, consume, slots, kills.
ONCE_STUCK = {
    "one below two lenders has no slot": ((0, 1, 2, 3), (1, 1, 0, 1), 1, 0),
    "a leaf is killed": ((0, 1, 2, 3), (1, 1, 1, 1), 1, 1),
    "a slot comes free amid lenders": ((0, 0, 2, 3, 4, 5), (1, 1, 1, 1, 1, 1), 2, 0),
    "two without a slot in a row": ((0, 1, 2, 3, 4), (1, 0, 0, 1, 1), 1, 0),
}


@pytest.mark.contract("N3")
@pytest.mark.parametrize(
    ("parents", "consumes", "slots", "kills"), ONCE_STUCK.values(), ids=ONCE_STUCK
)
def test_once_stuck(
    parents: tuple[int, ...], consumes: tuple[int, ...], slots: int, kills: int
) -> None:
    """Larger trees that need all of the rules."""
    found = assert_never_stuck(jobs_of(parents, consumes), slots, kills)
    assert found.states > 100


#: For each rule the smallest tree that it is there for: parents, consume, slots, kills.
NEEDED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int]] = {
    "lend_in_submit": ((0, 1), (1, 1), 1, 0),
    "bell": ((0, 1, 2), (1, 0, 1), 1, 0),
    "sweep": ((0, 1), (1, 1), 1, 1),
    "fresh_berth": ((0, 1), (1, 1), 1, 1),
    "all_ring": ((0, 1, 2, 3), (1, 1, 1, 1), 1, 1),
    "pass_on": ((0, 1, 2, 3), (1, 1, 0, 1), 1, 0),
}


@pytest.mark.parametrize("rule", NEEDED)
def test_rule_is_needed(rule: str) -> None:
    """Without any one of the rules the search finds the deadlock that the rule is there for."""
    parents, consumes, slots, kills = NEEDED[rule]
    jobs = jobs_of(parents, consumes)

    without = explore(Model(jobs, slots, Rules()._replace(**{rule: False}), kills))
    with_it = explore(Model(jobs, slots, Rules(), kills))

    assert with_it.stuck is None
    assert without.stuck is not None
    last = without.stuck[-1]
    model = Model(jobs, slots, Rules()._replace(**{rule: False}), kills)
    assert not list(model.steps(last))
    assert not model.is_final(last)
    assert len(show(without.stuck).splitlines()) == len(without.stuck)


def test_broken_cap_is_found() -> None:
    """Without waiting for a slot after having lent one, the search finds too many jobs running."""
    with pytest.raises(Broken, match="run on 1 slots"):
        explore(Model(jobs_of((0, 1)), 1, Rules(regain=False)))


def test_lost_token_is_found() -> None:
    """The search finds a token that is nowhere."""

    class Loses(Model):
        def steps(self, state: Any) -> Any:
            for after in super().steps(state):
                yield after._replace(stray=0)

    with pytest.raises(Broken, match="tokens of 1"):
        explore(Loses(jobs_of((0, 1)), 1, kills=1))


def test_endless_order_is_found() -> None:
    """The search finds an order of actions that never ends."""

    class Dithers(Model):
        def steps(self, state: Any) -> Any:
            yield from super().steps(state)
            # A process that has run to its call runs to it again.
            for me, process in enumerate(state.processes):
                if process.phase == 2 and process.own == -1:
                    processes = list(state.processes)
                    processes[me] = process._replace(phase=1)
                    yield state._replace(processes=tuple(processes))

    assert explore(Dithers(jobs_of((0,)), 1)).endless


def test_forests() -> None:
    """Every forest comes, and comes once."""
    assert [len(set(forests(count))) for count in range(1, 7)] == [1, 2, 4, 9, 20, 48]
    assert [len(list(forests(count))) for count in range(1, 7)] == [1, 2, 4, 9, 20, 48]
    assert set(forests(3)) == {(0, 1, 2), (0, 1, 1), (0, 1, 0), (0, 0, 0)}


def test_programs() -> None:
    """Each choice of style, lend and consume comes; what map submits has a slot."""
    seen = {
        (jobs[0].style, jobs[0].lend, jobs[1].consume, jobs[2].consume)
        for jobs in programs((0, 1), STYLES)
    }
    by_hand = product(("batch", "chain", "drop"), (False, True), (0, 1), (0, 1))
    assert seen == {*by_hand, ("map", False, 1, 1), ("map", True, 1, 1)}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_those_of_the_code(rule: str) -> None:
    """The line that a rule of the model was read from is still in the function that it names."""
    path, line = RULES[rule]
    modules = path.split(".")
    names: list[str] = []
    while True:
        try:
            thing: Any = importlib.import_module("jobserver." + ".".join(modules))
            break
        except ModuleNotFoundError:
            names.insert(0, modules.pop())
    for name in names:
        thing = getattr(thing, name)

    assert line in " ".join(inspect.getsource(thing).split())


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_three_jobs_with_any_kills(style: str, slots: int) -> None:
    """Every forest of three jobs, any of them killed anywhere."""
    for parents in forests(3):
        for jobs in programs(parents, (style,)):
            assert_never_stuck(jobs, slots, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("parents", list(forests(4)), ids=str)
def test_four_jobs(parents: tuple[int, ...], slots: int) -> None:
    """Every forest of four jobs in every style; in batches, with one of them killed anywhere."""
    for jobs in programs(parents, ("chain", "map", "drop")):
        assert_never_stuck(jobs, slots, kills=0)
    for jobs in programs(parents, ("batch",)):
        assert_never_stuck(jobs, slots, kills=slots == 1)


@pytest.mark.slow
@pytest.mark.parametrize("parents", list(forests(5)), ids=str)
def test_five_jobs(parents: tuple[int, ...]) -> None:
    """Every forest of five jobs on one slot and on two, with and without slots of their own."""
    for slots in (1, 2):
        for consumes in product((1, 0), repeat=5):
            # Wide forests on two slots have a million states each, and nothing that deep ones lack.
            if slots == 2 and (parents.count(0) > 2 or sum(consumes) < 4):
                continue
            assert_never_stuck(jobs_of(parents, consumes), slots, kills=0)
