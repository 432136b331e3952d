# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Arguments of submit: what is taken, what is refused, and how they fail on their way."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    chain_text,
    descendants,
    everything,
    free_slots,
    identity,
    nothing,
    open_fds,
)
from jobs_results import ExitsWhenUnpickled, RaisesWhenPickled, RaisesWhenUnpickled

from jobserver import Jobserver, SubmissionDied

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.contract("S2", "S17")
@pytest.mark.parametrize("args", [(1, 2), [1, 2], iter([1, 2]), {1: None, 2: None}, range(1, 3)])
def test_args_may_be_any_iterable(args: Any) -> None:
    """Any iterable serves as args."""
    js = Jobserver("fork", 1)
    assert js.submit(everything, args=args).result(PATIENCE) == ((1, 2), {})


@pytest.mark.contract("S2", "S17")
def test_kwargs_may_be_any_mapping(method: str) -> None:
    """Any mapping serves as kwargs, also one that cannot be pickled itself."""
    js = Jobserver(method, 1)

    for kwargs in (OrderedDict(b=1), MappingProxyType({"b": 1})):
        assert js.submit(everything, kwargs=kwargs).result(PATIENCE) == ((), {"b": 1})


@pytest.mark.contract("S2")
def test_arguments_are_those_of_the_call() -> None:
    """What the caller does to a list of arguments after submit does not reach the job."""
    args, kwargs = [1], {"b": 2}
    js = Jobserver("fork", 1)

    future = js.submit(add, args=args, kwargs=kwargs)
    args[0] = 50
    kwargs["b"] = 60

    assert future.result(PATIENCE) == 3


@pytest.mark.contract("S2")
def test_large_arguments(method: str) -> None:
    """Arguments larger than any pipe arrive whole, also while the worker is slow to read."""
    block = os.urandom(8 << 20)

    with Jobserver(method, 1) as js:
        assert js.submit(identity, args=(block,)).result(PATIENCE) == block


@pytest.mark.contract("S5")
@pytest.mark.parametrize("consume", [2, -1, True, False, 0.0, 1.0, "1", None, [1]])
def test_bad_consume(consume: Any) -> None:
    """Anything but the ints 0 and 1 is a ValueError."""
    js = Jobserver("fork", 1)
    with pytest.raises(ValueError):
        js.submit(nothing, consume=consume)


@pytest.mark.contract("S17", "S18")
@pytest.mark.parametrize(
    "wrong",
    [
        {"fn": 5},
        {"fn": None},
        {"fn": "len"},
        {"args": 5},
        {"args": None},
        {"kwargs": 5},
        {"kwargs": None},
        {"kwargs": [("b", 1)]},
        {"kwargs": {5: 1}},
        {"timeout": -1},
        {"timeout": -1e-9},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": -math.inf},
        {"timeout": "1"},
        {"timeout": b"1"},
        {"timeout": [1]},
        {"timeout": 1j},
        {"timeout": object()},
        {"env": 5},
        {"preexec_fn": 5},
        {"sleep_fn": 5},
    ],
    ids=lambda wrong: "-".join(f"{name}={value!r}"[:24] for name, value in wrong.items()),
)
def test_malformed_arguments(gate: Gate, wrong: dict[str, Any]) -> None:
    """Malformed arguments raise TypeError or ValueError at the call; nothing is left behind."""
    js = Jobserver("fork", 1)
    js.submit(nothing).result(PATIENCE)
    before = len(open_fds())

    with pytest.raises((TypeError, ValueError)):
        js.submit(**{"fn": add, "args": (1,), **wrong})

    assert len(open_fds()) == before
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S17")
@pytest.mark.parametrize("wrong", [{"timeout": -1}, {"args": 5}, {"consume": 3}, {"env": {"": ""}}])
def test_malformed_arguments_are_seen_first(gate: Gate, wrong: dict[str, Any]) -> None:
    """Malformed arguments are reported at once, also when no slot is free."""
    js = Jobserver("fork", 1)
    running = js.submit(gate.enter)

    with pytest.raises((TypeError, ValueError)):
        js.submit(**{"fn": add, "args": (1,), **wrong})

    gate.open()
    running.result(PATIENCE)


@pytest.mark.contract("S18")
def test_failing_iterable_of_args(gate: Gate) -> None:
    """An exception while args are read passes through and leaves nothing behind."""
    js = Jobserver("fork", 1)

    def args() -> Any:
        yield 1
        raise LookupError("half-way")

    with pytest.raises(LookupError, match="half-way"):
        js.submit(add, args=args())
    assert free_slots(js, gate) == 1


@pytest.mark.contract("S19", "S18")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize(
    "what",
    [
        {"fn": lambda: 1},
        {"args": (threading.Lock(),)},
        {"kwargs": {"a": RaisesWhenPickled()}},
        {"preexec_fn": lambda: None},
    ],
    ids=["fn", "args", "kwargs", "preexec_fn"],
)
def test_unpicklable_arguments(method: str, gate: Gate, what: dict[str, Any]) -> None:
    """What cannot be pickled is a TypeError that names the start method and keeps the cause."""
    with Jobserver(method, 1) as js:
        js.submit(nothing).result(PATIENCE)
        before = (len(open_fds()), len(descendants()))
        with pytest.raises(TypeError, match=method) as caught:
            js.submit(**{"fn": everything, **what})
        assert caught.value.__cause__ is not None
        del caught
        after = (len(open_fds()), len(descendants()))
        # What is left of the first job's process may go meanwhile.
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        assert free_slots(js, gate) == 1


@pytest.mark.contract("S2", "S19")
def test_fork_needs_no_pickling(tmp_path: Path) -> None:
    """Under fork lambdas, closures, locks, open files and generators are good arguments."""
    local = [1, 2]
    lock = threading.Lock()
    generator = (n * n for n in range(4))
    js = Jobserver("fork", 1)
    with (tmp_path / "data").open("w+") as stream:
        stream.write("text")
        stream.seek(0)
        assert js.submit(lambda: [*local, 3]).result(PATIENCE) == [1, 2, 3]
        assert js.submit(lambda a: a.acquire(False), args=(lock,)).result(PATIENCE) is True
        assert js.submit(sum, args=(generator,)).result(PATIENCE) == 14
        assert js.submit(lambda a: a.read(), args=(stream,)).result(PATIENCE) == "text"
    assert not lock.locked()


@pytest.mark.contract("S18", "S19")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_arguments_that_cannot_be_unpickled(method: str, gate: Gate) -> None:
    """Arguments that fail to load in the worker fail their own Future, and say why."""
    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=(RaisesWhenUnpickled(),))
        with pytest.raises(Exception) as caught:
            future.result(PATIENCE)
        assert "unpickled too late" in chain_text(caught.value)
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("S18", "F9", "F10")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_arguments_that_kill_the_worker(method: str, gate: Gate) -> None:
    """A worker that dies while it loads its arguments is a SubmissionDied like any other."""
    with Jobserver(method, 1) as js:
        future = js.submit(identity, args=(ExitsWhenUnpickled(),))
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        assert caught.value.exitcode == 18
        del caught
        assert free_slots(js, gate) == 1
