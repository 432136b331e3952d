# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What becomes of the exceptions of callbacks."""

from __future__ import annotations

import pytest
from helpers import (
    OBSERVERS,
    PATIENCE,
    Gate,
    await_answer,
    chain_text,
    fail,
    free_slots,
    identity,
    nothing,
    observe,
)

from jobserver import CallbackRaised, Jobserver


class OwnInterrupt(BaseException):
    """Like KeyboardInterrupt: no Exception."""


@pytest.mark.contract("F14", "F19", "F20")
def test_when_done_raises_callback_raised_itself() -> None:
    """A callback that fails at once surfaces from when_done; it was registered nevertheless."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=(1,))
    future.wait(PATIENCE)

    with pytest.raises(CallbackRaised) as caught:
        future.when_done(int, "no number")
    assert caught.value.seqno == 0
    assert isinstance(caught.value.__cause__, ValueError)
    assert future.when_done(nothing) == 1
    assert future.result(0) == 1


@pytest.mark.contract("F19", "F20")
@pytest.mark.parametrize("how", OBSERVERS)
def test_callback_raised(how: str) -> None:
    """A callback's Exception surfaces from the observing call, with its cause and number."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=("value",))
    future.when_done(nothing)
    future.when_done(int, "no number")
    await_answer(future)

    with pytest.raises(CallbackRaised) as caught:
        observe(js, future, how)

    assert caught.value.seqno == 1
    assert isinstance(caught.value.__cause__, ValueError)
    assert "no number" in chain_text(caught.value)
    observe(js, future, how)
    assert future.result(0) == "value"


@pytest.mark.contract("F19")
def test_callback_raised_as_text() -> None:
    """CallbackRaised shows its number, which must be an int."""
    raised = CallbackRaised(7)

    assert str(raised) == repr(raised) == "CallbackRaised(seqno=7)"
    assert raised.seqno == CallbackRaised(seqno=7).seqno == 7
    for wrong in ("7", 7.0, None):
        with pytest.raises(TypeError):
            CallbackRaised(wrong)  # type: ignore[arg-type]


@pytest.mark.contract("F20", "F13")
def test_one_error_for_each_call() -> None:
    """Each call raises at most one error, in order, and the good callbacks run in between."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=("value",))
    seen: list[str] = []
    for number in range(3):
        future.when_done(fail, KeyError, number)
        future.when_done(seen.append, f"after {number}")
    numbers = []
    for call in (future.result, future.wait, future.done):
        with pytest.raises(CallbackRaised) as caught:
            call(PATIENCE)
        numbers.append(caught.value.seqno)
        assert repr(caught.value.__cause__) == f"KeyError({len(numbers) - 1})"

    assert numbers == [0, 2, 4]
    assert future.result(PATIENCE) == "value"
    assert seen == ["after 0", "after 1", "after 2"]


@pytest.mark.contract("F20", "F7")
def test_errors_of_callbacks_come_before_the_jobs_own() -> None:
    """When both fn and a callback failed, the drained Future still raises fn's exception."""
    js = Jobserver("fork", 1)
    future = js.submit(fail, args=(LookupError, "mine"))
    future.when_done(int, "no number")

    with pytest.raises(CallbackRaised):
        future.result(PATIENCE)
    with pytest.raises(LookupError, match="mine"):
        future.result(PATIENCE)


@pytest.mark.contract("F21")
def test_never_wrapped_twice(gate: Gate) -> None:
    """CallbackRaised that comes out of a callback surfaces as it is."""
    js = Jobserver("fork", 2)
    inner, outer = js.submit(nothing), js.submit(gate.enter)
    inner.wait(PATIENCE)
    original: list[CallbackRaised] = []

    def meet() -> None:
        try:
            inner.when_done(int, "no number")
        except CallbackRaised as raised:
            original.append(raised)
            raise

    outer.when_done(meet)
    gate.open()
    caught: list[BaseException] = []
    for _ in range(3):
        try:
            outer.wait(PATIENCE)
        except CallbackRaised as raised:
            caught.append(raised)

    assert len(caught) == 1
    assert isinstance(caught[0].__cause__, ValueError)
    if original:
        assert caught == original


@pytest.mark.contract("F21")
def test_callback_raising_callback_raised() -> None:
    """A callback that raises a CallbackRaised of its own is not wrapped either."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    mine = CallbackRaised(41)

    def raise_mine() -> None:
        raise mine

    future.when_done(raise_mine)
    with pytest.raises(CallbackRaised) as caught:
        future.wait(PATIENCE)

    assert caught.value is mine
    assert future.wait(PATIENCE)


@pytest.mark.contract("F22", "F20")
@pytest.mark.parametrize("kind", [OwnInterrupt, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("how", OBSERVERS)
def test_base_exceptions_pass(how: str, kind: type[BaseException], gate: Gate) -> None:
    """A callback's BaseException passes through bare; later callbacks and slots are not lost."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=("value",))
    seen: list[str] = []
    future.when_done(fail, kind)
    future.when_done(seen.append, "called")
    await_answer(future)

    with pytest.raises(kind):
        observe(js, future, how)

    js.reclaim_resources()
    assert future.result(0) == "value"
    assert seen == ["called"]
    assert free_slots(js, gate) == 1
