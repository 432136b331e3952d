# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver.map: order, inputs, chunks, buffers and options."""

from __future__ import annotations

import inspect
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    everything,
    free_slots,
    getenv,
    identity,
    lines,
    nothing,
    pid,
    settle,
)
from jobs import Appender, nested_map, slow_for
from map_jobs import meet_neighbour

from jobserver import Jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.contract("M1")
def test_signature() -> None:
    """map takes fn, argses and kwargses by position, the rest by keyword."""
    parameters = dict(inspect.signature(Jobserver.map).parameters)
    parameters.pop("self")

    positional = {n: p.default for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY}
    empty = inspect.Parameter.empty
    assert list(positional.items()) == [("fn", empty), ("argses", None), ("kwargses", None)]
    defaults = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert sorted(defaults) == [
        "buffersize",
        "chunksize",
        "env",
        "preexec_fn",
        "sleep_fn",
        "timeout",
    ]
    assert defaults.pop("chunksize") == 1
    assert set(defaults.values()) == {None}


@pytest.mark.contract("M2", "M3", "M8")
@pytest.mark.parametrize("chunksize", [1, 3, 50])
@pytest.mark.parametrize("buffersize", [None, 1, 4])
def test_results_in_order(chunksize: int, buffersize: int | None) -> None:
    """Results come in the order of the inputs, whatever the chunks and buffers."""
    with Jobserver("fork", 3) as js:
        argses = [(n,) for n in range(10)]
        got = js.map(slow_for, argses, chunksize=chunksize, buffersize=buffersize)

        assert list(got) == list(range(10))


class Odd(type):
    """A type of types that cannot be told apart by a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(cls, other: object) -> bool:
        return cls is other


class OddTuple(tuple, metaclass=Odd):  # type: ignore[type-arg]
    """Arguments of an unusual type."""

    __slots__ = ()


@pytest.mark.contract("M3")
def test_arguments_of_an_odd_type() -> None:
    """Whatever an element is, its items are the arguments."""
    with Jobserver("fork", 1) as js:
        assert list(js.map(add, [OddTuple((1, 2)), (3, 4)])) == [3, 7]


@pytest.mark.contract("M2", "M3")
def test_every_method(method: str) -> None:
    """map works the same with every start method."""
    with Jobserver(method, 2) as js:
        assert list(js.map(add, [(1, 2), (3,)], chunksize=2)) == [3, 3]
        assert list(js.map(add, [(1, 2), (3,)])) == [3, 3]


@pytest.mark.contract("M8", "N5")
@pytest.mark.parametrize("tasks", [1, None])
def test_single_calls_begin_in_order(tasks: int | None, tmp_path: Path) -> None:
    """With chunksize=1 no call waits behind another one for a worker: neighbours may meet."""
    with Jobserver("fork", 2, max_tasks_per_child=tasks) as js:
        argses = [(str(tmp_path), number) for number in range(40)]

        assert list(js.map(meet_neighbour, argses)) == list(range(40))


@pytest.mark.contract("M3")
def test_kinds_of_inputs() -> None:
    """argses holds positional arguments, kwargses keyword arguments; both may be any iterable."""
    with Jobserver("fork", 2) as js:
        assert list(js.map(everything, [(), [1], "ab", iter([2])])) == [
            ((), {}),
            ((1,), {}),
            (("a", "b"), {}),
            ((2,), {}),
        ]
        assert list(js.map(everything, kwargses=[{}, {"a": 1}])) == [((), {}), ((), {"a": 1})]
        both = js.map(everything, ((n,) for n in range(2)), ({"k": n} for n in range(2)))
        assert list(both) == [((0,), {"k": 0}), ((1,), {"k": 1})]


@pytest.mark.contract("M3")
@pytest.mark.parametrize("inputs", [{"argses": []}, {"kwargses": []}, {"argses": iter(())}])
def test_no_inputs(inputs: dict[str, Any]) -> None:
    """Without inputs there are no results."""
    js = Jobserver("fork", 1)
    assert list(js.map(identity, **inputs)) == []


@pytest.mark.contract("M4")
@pytest.mark.parametrize(
    ("argses", "kwargses"), [([(1,)], []), ([], [{}]), ([(1,), (2,)], [{}]), ([(1,)], [{}, {}])]
)
def test_lengths_must_agree(tmp_path: Path, argses: list[Any], kwargses: list[Any]) -> None:
    """Sequences of different length are a ValueError at the call, before anything has run."""
    js = Jobserver("fork", 1, preexec_fn=Appender(tmp_path / "log"))

    with pytest.raises(ValueError):
        js.map(identity, argses, kwargses)

    js.submit(nothing).result(PATIENCE)
    assert len(lines(tmp_path / "log")) == 1


@pytest.mark.contract("M4", "M6")
def test_lengths_of_generators_must_agree() -> None:
    """Without a buffersize the inputs are collected, so generators are compared at the call."""
    js = Jobserver("fork", 1)
    with pytest.raises(ValueError):
        js.map(identity, iter([(1,), (2,)]), iter([{}]))


@pytest.mark.contract("M4", "M7")
def test_known_lengths_must_agree_at_once() -> None:
    """With a buffersize, too, lengths that can be asked for are compared at the call."""
    js = Jobserver("fork", 1)

    with pytest.raises(ValueError):
        js.map(identity, [(1,)], [{}, {}], buffersize=1)


@pytest.mark.contract("M4", "M7")
def test_lengths_of_lazy_inputs_must_agree() -> None:
    """With a buffersize the mismatch shows when the shorter input ends."""
    js = Jobserver("fork", 1)

    with pytest.raises(ValueError):
        list(js.map(identity, iter([(n,) for n in range(9)]), iter([{}] * 4), buffersize=2))
    settle(js)


@pytest.mark.contract("M5")
@pytest.mark.parametrize("inputs", [{"argses": {"a": 1}}, {"kwargses": {"a": 1}}])
def test_bare_mapping(inputs: dict[str, Any]) -> None:
    """A mapping in the place of an iterable of inputs is a TypeError at the call."""
    js = Jobserver("fork", 1)
    with pytest.raises(TypeError):
        js.map(identity, **inputs)


@pytest.mark.contract("M3")
@pytest.mark.parametrize(
    "wrong",
    [
        {"argses": 5},
        {"kwargses": 5},
        {"argses": [5]},
        {"kwargses": [5]},
        {"kwargses": [[("a", 1)]]},
        {"fn": 5},
    ],
    ids=repr,
)
def test_malformed_inputs(gate: Gate, wrong: dict[str, Any]) -> None:
    """Inputs that are no arguments raise TypeError, at the latest when they are due."""
    js = Jobserver("fork", 1)

    with pytest.raises(TypeError):
        list(js.map(**{"fn": identity, **({"argses": [(1,)]} if "fn" in wrong else {}), **wrong}))

    assert free_slots(js, gate) == 1


@pytest.mark.contract("M6")
def test_inputs_are_collected_now(method: str) -> None:
    """With buffersize None the inputs have been read when map returns."""
    source = iter([(1,), (2,), (3,)])
    with Jobserver(method, 1) as js:
        results = js.map(identity, source)

        assert list(source) == []
        assert list(results) == [1, 2, 3]


@pytest.mark.contract("M7", "N1")
@pytest.mark.parametrize("tasks", [1, None])
def test_lazy_inputs_are_read_without_a_slot_in_hand(tasks: int | None) -> None:
    """While the inputs, code of the user's, give the next ones, ended jobs' slots are free."""
    in_hand: list[int] = []

    def source() -> Iterator[tuple[int]]:
        for number in range(100):
            in_hand.append(len(js._shared.reactor.crew.loaded))
            yield (number,)

    with Jobserver("fork", 2, max_tasks_per_child=tasks) as js:
        assert list(js.map(identity, source(), buffersize=4, chunksize=2)) == [*range(100)]
    assert in_hand == [0] * 100


@pytest.mark.contract("M7")
@pytest.mark.parametrize(("buffersize", "chunksize"), [(1, 1), (3, 1), (2, 3)])
def test_lazy_inputs(buffersize: int, chunksize: int) -> None:
    """With a buffersize only as much is read ahead as may be outstanding."""
    read = 0

    def source() -> Iterator[tuple[int]]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield (number,)

    js = Jobserver("fork", 2)
    results = js.map(identity, source(), buffersize=buffersize, chunksize=chunksize)
    assert read <= buffersize * chunksize
    for number in range(7):
        assert next(results) == number
        assert read <= number + 1 + (buffersize + 1) * chunksize
    del results
    settle(js)


@pytest.mark.contract("M7")
def test_buffersize_bounds_submissions(gate: Gate) -> None:
    """At most buffersize submissions are outstanding, even when more slots are free."""
    most: list[int] = []

    def open_later() -> None:
        gate.await_entered(2)
        # Time for a third to come, if there were one.
        time.sleep(0.1)
        most.append(len(gate.entered()))
        gate.open()

    js = Jobserver("fork", 5)
    thread = threading.Thread(target=open_later)
    thread.start()
    results = list(js.map(gate.enter, [()] * 4, buffersize=2))
    thread.join(PATIENCE)

    assert most == [2]
    assert len(results) == 4


@pytest.mark.contract("M7")
def test_infinite_inputs(method: str) -> None:
    """Infinite iterators work with a buffersize."""
    with Jobserver(method, 2) as js:
        results = js.map(add, zip(itertools.count()), itertools.repeat({"b": 1}), buffersize=2)

        assert list(itertools.islice(results, 4)) == [1, 2, 3, 4]
        del results
        settle(js)


@pytest.mark.fresh("counts chunks by their processes")
@pytest.mark.contract("M8")
@pytest.mark.parametrize(("chunksize", "workers"), [(1, 6), (2, 3), (4, 2), (10, 1)])
def test_chunks_share_a_worker(chunksize: int, workers: int) -> None:
    """chunksize successive calls run in one worker."""
    with Jobserver("fork", 1) as js:
        pids = list(js.map(pid, [()] * 6, chunksize=chunksize))

    assert [len(list(group)) for _, group in itertools.groupby(pids)] == [
        min(chunksize, 6 - start) for start in range(0, 6, chunksize)
    ]
    assert len(set(pids)) == workers


@pytest.mark.contract("M9")
@pytest.mark.parametrize("name", ["chunksize", "buffersize"])
@pytest.mark.parametrize("value", [0, -1, 0.5, "2"])
def test_sizes_must_be_positive_ints(name: str, value: Any) -> None:
    """chunksize and buffersize below 1, or of another type, are refused at the call."""
    js = Jobserver("fork", 1)
    with pytest.raises((TypeError, ValueError)):
        js.map(identity, [(1,)], **{name: value})


@pytest.mark.contract("M1", "S14", "J9")
def test_options_of_map_override_the_handles(tmp_path: Path) -> None:
    """env, preexec_fn and sleep_fn given to map override the handle's."""
    asked: list[str] = []
    js = Jobserver(
        "fork",
        1,
        env={"JOBSERVER_T": "handle"},
        preexec_fn=Appender(tmp_path / "log", "handle"),
        sleep_fn=lambda: asked.append("handle"),
    )
    results = js.map(
        getenv,
        [("JOBSERVER_T",)] * 2,
        env={"JOBSERVER_T": "map"},
        preexec_fn=Appender(tmp_path / "log", "map"),
        sleep_fn=lambda: asked.append("map"),
    )

    assert list(results) == [["map"]] * 2
    assert [line.split()[0] for line in lines(tmp_path / "log")] == ["map"] * 2
    # A piece that finds no slot yet may be asked about again.
    assert len(asked) >= 2
    assert set(asked) == {"map"}


@pytest.mark.contract("M1", "S7")
def test_bad_options() -> None:
    """Bad options are refused at the call."""
    js = Jobserver("fork", 1)

    options: list[Any] = [{"env": {"": ""}}, {"preexec_fn": 5}, {"sleep_fn": 5}]
    for wrong in options:
        with pytest.raises((TypeError, ValueError)):
            js.map(identity, [(1,)], **wrong)


@pytest.mark.contract("M1", "N5")
def test_map_inside_a_job(method: str) -> None:
    """A job may map over the pool that it runs in, with one slot too."""
    with Jobserver(method, 1) as js:
        assert js.submit(nested_map, args=(js, 3)).result(PATIENCE) == [0, 1, 2]
