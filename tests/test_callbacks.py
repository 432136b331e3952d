# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Future.when_done: when callbacks run, in which order, and what they may do."""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    OBSERVERS,
    PATIENCE,
    Gate,
    add,
    await_answer,
    fail,
    identity,
    nothing,
    observe,
)
from marks import by_method

from jobserver import Future, Jobserver, SubmissionDied

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.contract("F13", "H2", "S15")
@pytest.mark.parametrize("how", OBSERVERS)
def test_called_when_completion_is_observed(how: str) -> None:
    """Not the end of the job but its observation, by whatever call, issues the callbacks."""
    js = Jobserver("fork", 1)
    seen: list[tuple[int, str]] = []
    future = js.submit(nothing)
    future.when_done(lambda: seen.append((threading.get_ident(), "called")))
    await_answer(future)
    assert seen == []

    observe(js, future, how)

    assert seen == [(threading.get_ident(), "called")]


@pytest.mark.contract("F13", "F15", "F18")
def test_order_arguments_and_numbers(method: str) -> None:
    """Callbacks run in registration order with just their own arguments, numbered from 0."""
    calls: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> None:
        calls.append((args, kwargs))

    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=(1,))
        numbers = [
            future.when_done(note),
            future.when_done(note, 1, 2, fn=3, self=4),
            future.when_done(note, future),
        ]
        assert future.wait(PATIENCE)
        numbers.append(future.when_done(note, "late"))

    assert numbers == [0, 1, 2, 3]
    assert calls == [((), {}), ((1, 2), {"fn": 3, "self": 4}), ((future,), {}), (("late",), {})]


@pytest.mark.contract("F13", "H13")
def test_called_on_the_observing_thread() -> None:
    """The thread that observes the end runs the callback, whoever registered it."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    seen: list[int] = []
    future.when_done(lambda: seen.append(threading.get_ident()))
    thread = threading.Thread(target=future.wait)
    thread.start()
    ident = thread.ident
    thread.join(PATIENCE)

    assert future.done()
    assert seen == [ident]


@pytest.mark.contract("F13")
def test_called_exactly_once() -> None:
    """Observing again does not call again."""
    js = Jobserver("fork", 1)
    seen: list[int] = []
    future = js.submit(nothing)
    future.when_done(seen.append, 1)
    for how in OBSERVERS * 2:
        observe(js, future, how)

    assert seen == [1]


@pytest.mark.contract("F13", "F9")
def test_called_for_every_end(gate: Gate) -> None:
    """Callbacks run for values, exceptions and deaths alike."""
    js = Jobserver("fork", 2)
    seen: list[str] = []
    failed = js.submit(fail, args=(ValueError, "x"))
    failed.when_done(seen.append, "failed")
    killed = js.submit(gate.enter)
    killed.when_done(seen.append, "killed")
    assert failed.wait(PATIENCE)
    assert killed.wait(PATIENCE, signal=9)

    assert seen == ["failed", "killed"]
    with pytest.raises(SubmissionDied):
        killed.result()


@pytest.mark.contract("F14")
def test_at_once_when_done() -> None:
    """A callback for a Future that is done is called before when_done returns."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    future.wait(PATIENCE)
    seen: list[int] = []

    assert future.when_done(seen.append, 5) == 0

    assert seen == [5]


@pytest.mark.contract("F13")
@pytest.mark.parametrize("fn", [None, 5, "len"])
def test_callback_must_be_callable(fn: Any) -> None:
    """What cannot be called is refused when it is registered."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)

    with pytest.raises(TypeError):
        future.when_done(fn)
    assert future.when_done(nothing) == 0
    assert future.wait(PATIENCE)


@pytest.mark.contract("F16")
def test_callbacks_may_register_callbacks() -> None:
    """A callback registered by a callback runs too, after those registered before."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    seen: list[str] = []

    def first() -> None:
        seen.append("first")
        future.when_done(seen.append, "third")

    future.when_done(first)
    future.when_done(seen.append, "second")
    assert future.wait(PATIENCE)

    assert seen == ["first", "second", "third"]


@pytest.mark.contract("F16")
@pytest.mark.parametrize("when", ["running", "done"])
def test_chain_of_callbacks_without_recursion(when: str) -> None:
    """A chain of callbacks, each registering the next, may be longer than the stack is deep."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    length = 3 * sys.getrecursionlimit()
    count = 0

    def link() -> None:
        nonlocal count
        count += 1
        if count < length:
            future.when_done(link)

    if when == "done":
        future.wait(PATIENCE)
    future.when_done(link)
    assert future.wait(PATIENCE)

    assert count == length


@contextlib.contextmanager
def shallow_stack(depth: int) -> Iterator[None]:
    """Allow only so many frames above the present one."""
    here, frame = 0, sys._getframe()
    while frame is not None:
        here, frame = here + 1, frame.f_back  # type: ignore[assignment]
    usual = sys.getrecursionlimit()
    sys.setrecursionlimit(here + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(usual)


@pytest.mark.contract("F16")
def test_callbacks_that_observe_other_futures(gate: Gate) -> None:
    """Callbacks that wait for a Future whose callbacks wait for the next: no recursion limit."""
    js = Jobserver("fork", 2)
    seen: list[int] = []
    futures = [js.submit(gate.enter, consume=0) for _ in range(60)]
    gate.await_entered(60)

    def follow(number: int) -> None:
        seen.append(number)
        if number + 1 < len(futures):
            assert futures[number + 1].result(PATIENCE) in gate.entered()

    for number, future in enumerate(futures):
        future.when_done(follow, number)
    gate.open()
    with shallow_stack(120):
        assert futures[0].wait(PATIENCE)
        js.reclaim_resources()

    assert sorted(seen) == list(range(60))


@pytest.mark.contract("F16", "F17")
def test_callbacks_that_submit_without_recursion() -> None:
    """A callback may submit work whose callback submits work, and so on, beyond the stack."""
    js = Jobserver("fork", 1)
    seen: list[int] = []

    def again(number: int) -> None:
        seen.append(number)
        if number < 80:
            js.submit(nothing).when_done(again, number + 1)

    with shallow_stack(150):
        js.submit(nothing).when_done(again, 0)
        while len(seen) < 81:
            js.submit(nothing, timeout=PATIENCE).wait(PATIENCE)

    assert seen == list(range(81))


@pytest.mark.contract("F17")
@by_method("how", ["wait", "done", "result", "reclaim_resources"])
def test_slots_are_back_before_callbacks(method: str, how: str) -> None:
    """With one slot a callback can submit at once: the job's slot is back already."""
    followers: list[Future[int]] = []
    with Jobserver(method, 1) as js:
        future = js.submit(nothing)
        future.when_done(lambda: followers.append(js.submit(add, args=(1, 2), timeout=0)))
        if how == "reclaim_resources":
            await_answer(future)
        observe(js, future, how)
        assert followers[0].result(PATIENCE) == 3


@pytest.mark.contract("F17", "S15")
def test_callback_that_submits_while_submit_waits(gate: Gate) -> None:
    """A callback issued inside a waiting submit may take the slot; that submit waits on."""
    js = Jobserver("fork", 1)
    order: list[str] = []
    followers: list[Future[Any]] = []
    first = js.submit(gate.enter)
    first.when_done(lambda: followers.append(js.submit(nothing, timeout=0)))
    first.when_done(order.append, "called")
    gate.await_entered(1)
    threading.Timer(0.05, gate.open).start()

    assert js.submit(identity, args=(9,), timeout=PATIENCE).result(PATIENCE) == 9
    assert order == ["called"]
    assert followers[0].done()


@pytest.mark.contract("F16", "F23")
def test_callback_may_use_its_own_future() -> None:
    """Inside its callback a Future is done and gives its result."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=(8,))
    seen: list[Any] = []
    future.when_done(lambda: seen.append((future.done(), future.result(0), repr(future))))
    assert future.wait(PATIENCE)

    assert seen[0][:2] == (True, 8)
    assert seen[0][2].startswith("Future(done, ")


@pytest.mark.contract("F16", "F6")
def test_callback_may_wait_for_a_running_job(gate: Gate) -> None:
    """A callback may block on another job's result."""
    js = Jobserver("fork", 2)
    late = js.submit(gate.enter)
    soon = js.submit(nothing)
    gate.await_entered(1)
    seen: list[int] = []
    soon.when_done(lambda: seen.append(late.result(PATIENCE)))
    threading.Timer(0.05, gate.open).start()
    assert soon.wait(PATIENCE)

    assert seen == gate.entered()
