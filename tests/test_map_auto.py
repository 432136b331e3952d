# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver.map(chunksize="auto"): the results of chunksize=1, with fewer submissions."""

from __future__ import annotations

import concurrent.futures
import errno
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Callable

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
    settle,
    wait_until,
)
from jobs import Appender, fail_for
from map_jobs import (
    Explosive,
    big,
    doubled,
    end_for,
    explosive,
    hold_or_die,
    mapped_inside,
    meet,
    note,
    number_of,
    odd_result,
    pid_for,
    through,
)

from jobserver import Jobserver, SubmissionDied, _batches
from jobserver._pace import Pace
from jobserver._worker._ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Fresh workers, and such that stay.
kept = pytest.mark.parametrize("tasks", [1, None], ids=["fresh", "warm"])
swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


@pytest.fixture
def batches_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let batches have a number of calls that the test chooses."""

    def choose(size: int) -> None:
        monkeypatch.setattr(Pace, "next", lambda self, left, slots: size)

    return choose


def auto(js: Jobserver, fn: Callable[..., Any], argses: Any, **options: Any) -> Iterator[Any]:
    """Short for the map that is tested."""
    return js.map(fn, argses, chunksize="auto", **options)


@pytest.mark.contract("M13", "M2", "M3")
@kept
@pytest.mark.parametrize("buffersize", [None, 1, 100])
def test_results_in_order(method: str, tasks: int | None, buffersize: int | None) -> None:
    """Results come in the order of the inputs, whatever the batches and buffers."""
    # Each call is a submission where one may be outstanding.
    count = 10 if method == "spawn" and tasks else 30 if buffersize == 1 else 200
    with Jobserver(method, 2, max_tasks_per_child=tasks) as js:
        results = auto(js, identity, [(n,) for n in range(count)], buffersize=buffersize)
        assert list(results) == list(range(count))


@pytest.mark.contract("M13", "M3")
def test_kinds_of_inputs(batches_of: Callable[[int], None]) -> None:
    """argses and kwargses are what they are to a map of single calls."""
    batches_of(3)
    with Jobserver("fork", 2) as js:
        assert list(auto(js, everything, [(), [1], "ab", iter([2])])) == [
            ((), {}),
            ((1,), {}),
            (("a", "b"), {}),
            ((2,), {}),
        ]
        found = js.map(everything, kwargses=[{}, {"a": 1}] * 2, chunksize="auto")
        assert list(found) == [((), {}), ((), {"a": 1})] * 2
        both = auto(js, add, ((n,) for n in range(5)), kwargses=({"b": n} for n in range(5)))
        assert list(both) == [0, 2, 4, 6, 8]
        assert list(auto(js, identity, [])) == []


@pytest.mark.contract("M13", "M8", "M3")
@kept
@pytest.mark.parametrize("chunksize", ["auto", 4])
@pytest.mark.parametrize("kind", [list, iter])
def test_numbers_of_arguments(
    batches_of: Callable[[int], None], tasks: int | None, chunksize: Any, kind: Callable[..., Any]
) -> None:
    """Calls with one argument may go along with calls that have none or more."""
    batches_of(4)
    argses: list[Any] = [(1,), (2,), ((),), ((3,),), ([4],), (5, 6), (), (7,), [8], "9"]
    with Jobserver("fork", 1, max_tasks_per_child=tasks) as js:
        found = js.map(everything, kind(argses), chunksize=chunksize)
        assert list(found) == [(tuple(args), {}) for args in argses]


@pytest.mark.contract("M13")
@swift
@pytest.mark.fresh("tells batches apart by their processes")
def test_cheap_calls_share_workers(method: str) -> None:
    """Calls that cost less than handing them over go together; the first and the last do not."""
    with Jobserver(method, 2) as js:
        pids = list(auto(js, pid_for, [(n,) for n in range(2000)]))

    batches = Counter(pids)
    assert len(batches) < 400
    assert max(batches.values()) >= 16
    assert pids[0] != pids[1]
    assert batches[pids[-1]] <= 8


@pytest.mark.contract("M13")
@pytest.mark.fresh("tells batches apart by their processes")
def test_dear_calls_do_not() -> None:
    """Calls that last as long as a batch is to last get a worker each."""
    with Jobserver("fork", 8) as js:
        pids = list(auto(js, slow_pid, [()] * 24))

    assert len(set(pids)) == 24


def slow_pid() -> int:
    """Take longer than a batch of one may take to be given company."""
    time.sleep(0.11)
    return pid_for(0)


@pytest.mark.contract("M14", "F7")
@kept
@swift
def test_exception_is_that_of_its_call(
    method: str, tasks: int | None, batches_of: Callable[[int], None], tmp_path: Path
) -> None:
    """Results before a failed call are yielded, then its exception; the calls after it are made."""
    batches_of(10)
    log = tmp_path / "log"
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        results = auto(js, end_for, [(str(log), n, 4, "raise") for n in range(10)])
        assert next(results) == 0
        # With its exception the iteration ends, and takes back what has not begun by then.
        wait_until(lambda: len(lines(log)) == 10, "the calls after it")
        assert [next(results) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(LookupError, match="4") as caught:
            next(results)
        assert "end_for" in str(caught.value.__cause__)
        with pytest.raises(StopIteration):
            next(results)
    assert sorted(map(int, lines(log))) == list(range(10))


@pytest.mark.contract("M14", "F9", "F10")
@kept
@pytest.mark.parametrize(
    ("how", "exitcode"), [("kill", -9), ("_exit", 3), ("exit", 3), ("interrupt", 1)]
)
@swift
def test_death_is_that_of_its_call(
    method: str,
    tasks: int | None,
    how: str,
    exitcode: int,
    batches_of: Callable[[int], None],
    tmp_path: Path,
    gate: Gate,
) -> None:
    """When a worker dies in a batch, the results before are yielded, then SubmissionDied."""
    batches_of(10)
    log = tmp_path / "log"
    with Jobserver(method, 2, max_tasks_per_child=tasks) as js:
        results = auto(js, end_for, [(str(log), n, 14, how) for n in range(30)])
        found: list[int] = []
        with pytest.raises(SubmissionDied) as caught:
            found.extend(results)
        assert found == list(range(14))
        assert caught.value.exitcode == exitcode
        settle(js)
        assert free_slots(js, gate) == 2
    assert max(Counter(lines(log)).values()) == 1


@pytest.mark.contract("M15")
@swift
def test_what_a_dead_worker_left_is_made(
    method: str, batches_of: Callable[[int], None], tmp_path: Path, gate: Gate
) -> None:
    """The calls that a dead worker had not begun are made by another one, while others go on."""
    batches_of(10)
    log = tmp_path / "log"
    with Jobserver(method, 2) as js:
        argses = [(gate, str(log), n) for n in range(20)]
        results = auto(js, hold_or_die, argses)
        for n in range(9):
            assert next(results) == n
            if n == 0:
                # Asked for in a thread of its own the rest would come by itself; here, by asking.
                gate.open()
        assert [next(results) for _ in range(6)] == list(range(9, 15))
        with pytest.raises(SubmissionDied):
            next(results)
    assert set(map(int, lines(log))) >= set(range(16))
    assert max(Counter(lines(log)).values()) == 1


@pytest.mark.contract("M8", "M17", "F9")
@kept
@swift
def test_death_in_a_chunk(method: str, tasks: int | None, tmp_path: Path) -> None:
    """In a chunk of a chosen size, too, the results before a death are yielded."""
    log = tmp_path / "log"
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        argses = [(str(log), n, 3, "kill") for n in range(6)]
        results = js.map(end_for, argses, chunksize=5)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SubmissionDied):
            next(results)
    # What follows in the chunk of the dead worker is not made.
    assert "4" not in lines(log)


@pytest.mark.contract("M14", "F11")
@kept
@swift
def test_what_cannot_be_sent_back(
    method: str, tasks: int | None, batches_of: Callable[[int], None]
) -> None:
    """A result that cannot be pickled, or unpickled here, is the failure of its own call."""
    batches_of(10)
    with Jobserver(method, 2, max_tasks_per_child=tasks) as js:
        for fn, word in ((odd_result, "pickle"), (explosive, "unpickled")):
            results = auto(js, fn, [(n, 5) for n in range(10)])
            for _ in range(5):
                next(results)
            with pytest.raises(RuntimeError, match=word):
                next(results)


@pytest.mark.contract("M14", "M15")
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_arguments_that_do_not_arrive(method: str, batches_of: Callable[[int], None]) -> None:
    """Arguments that cannot be unpickled in the worker are the failure of their own call."""
    batches_of(4)
    with Jobserver(method, 2) as js:
        results = auto(js, number_of, [(Explosive(n, n == 2),) for n in range(4)])
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(RuntimeError, match="armed"):
            next(results)


@pytest.mark.contract("M14", "S9")
def test_preexec_fn_that_fails(batches_of: Callable[[int], None], tmp_path: Path) -> None:
    """What preexec_fn raises is raised in the place of the first call, and no call is made."""
    batches_of(4)
    with Jobserver("fork", 2, preexec_fn=_refuse) as js:
        results = auto(js, note, [(str(tmp_path / "log"), n) for n in range(4)])
        with pytest.raises(PermissionError):
            next(results)
    assert lines(tmp_path / "log") == []


def _refuse() -> None:
    raise PermissionError


@pytest.mark.contract("M13", "M1", "S6", "S8")
def test_surroundings_are_those_of_a_batch(
    batches_of: Callable[[int], None], tmp_path: Path
) -> None:
    """env holds for every call; preexec_fn is called once for each batch."""
    batches_of(4)
    log = tmp_path / "log"
    with Jobserver("fork", 2) as js:
        options: Any = {"env": {"JOBSERVER_T": "map"}, "preexec_fn": Appender(log)}
        found = list(auto(js, getenv, [("JOBSERVER_T",)] * 8, **options))
    assert found == [["map"]] * 8
    assert len(lines(log)) == 2


@pytest.mark.contract("M16", "M7")
@pytest.mark.parametrize("buffersize", [1, 7, 500])
def test_buffersize_counts_calls(buffersize: int) -> None:
    """However large batches may be, no more inputs are read ahead than buffersize says."""
    read = 0

    def source() -> Iterator[tuple[int]]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield (number,)

    js = Jobserver("fork", 2)
    results = auto(js, identity, source(), buffersize=buffersize)
    assert read == 0
    for number in range(40 if buffersize < 100 else 600):
        assert next(results) == number
        assert read <= number + 1 + buffersize
    del results
    settle(js)


@pytest.mark.contract("M16", "M7")
def test_buffered_inputs_go_together() -> None:
    """With an endless input and a buffer, cheap calls go together all the same."""
    with Jobserver("fork", 2) as js:
        results = auto(js, pid_for, zip(itertools.count()), buffersize=600)
        pids = list(itertools.islice(results, 3000))
        del results
        settle(js)
    assert len(set(pids)) < 600


@pytest.mark.contract("M14", "M4")
def test_inputs_that_fail() -> None:
    """What was read before an input failed is mapped, as with single calls."""

    def source() -> Iterator[tuple[int]]:
        for number in range(100):
            yield (number,)
        raise LookupError("no more")

    with Jobserver("fork", 2) as js:
        results = auto(js, identity, source(), buffersize=8)
        found: list[int] = []
        with pytest.raises(LookupError, match="no more"):
            found.extend(results)
        assert found == list(range(len(found)))
        assert len(found) >= 100 - 8
        with pytest.raises(LookupError):
            auto(js, identity, source())
        settle(js)


@pytest.mark.contract("M10", "M14")
def test_timeout(batches_of: Callable[[int], None], gate: Gate) -> None:
    """Past the timeout TimeoutError is raised, after the results that were there."""
    batches_of(5)
    with Jobserver("fork", 1) as js:
        before = time.monotonic()
        results = auto(js, through, [(gate, n, 3) for n in range(10)], timeout=0.5)
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(concurrent.futures.TimeoutError):
            next(results)
        assert 0.5 <= time.monotonic() - before < 10
        gate.open()


@pytest.mark.contract("M14")
@kept
@swift
def test_results_do_not_wait_for_the_batch(
    method: str, tasks: int | None, batches_of: Callable[[int], None], gate: Gate
) -> None:
    """Results are yielded though a later call of the same batch goes on and on."""
    batches_of(8)
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        results = auto(js, through, [(gate, n, 5) for n in range(8)])
        assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert not gate.is_open()
        gate.open()
        assert list(results) == [5, 6, 7]


@pytest.mark.contract("M13", "M15")
@kept
@swift
def test_idle_slots_take_calls_over(
    method: str, tasks: int | None, batches_of: Callable[[int], None], tmp_path: Path
) -> None:
    """A slot that would idle takes over calls of a batch that is held up by one of its own."""
    batches_of(12)
    with Jobserver(method, 2, max_tasks_per_child=tasks) as js:
        argses = [(str(tmp_path), n, 0, 11) for n in range(12)]
        assert list(auto(js, meet, argses)) == list(range(12))


@pytest.mark.contract("M13", "M15")
@pytest.mark.fresh("tells batches apart by their processes")
def test_a_long_batch_gives_calls_back() -> None:
    """When calls turn out to be slow, a worker gives the rest of its batch back."""
    with Jobserver("fork", 1) as js:
        argses = [(0.0001 if n < 300 else 0.08,) for n in range(312)]
        pids = list(auto(js, slow_for_pid, argses))
    counts = Counter(pids[300:])
    assert max(counts.values()) < 9


def slow_for_pid(seconds: float) -> int:
    """Take a time, and give the worker's process id."""
    time.sleep(seconds)
    return pid_for(0)


@pytest.mark.contract("M11", "M12")
def test_leaving_early(batches_of: Callable[[int], None], gate: Gate, tmp_path: Path) -> None:
    """What has not begun when the iteration is left is not made, as with single calls."""
    batches_of(50)
    log = tmp_path / "log"
    with Jobserver("fork", 1) as js:
        results = auto(js, noted_through, [(gate, str(log), n) for n in range(50)])
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        del results
        gate.open()
        settle(js)
    assert 4 <= len(lines(log)) < 50


def noted_through(gate: Gate, log: str, number: int) -> int:
    """Note the call; the fifth waits for the gate."""
    return through(gate, note(log, number), 4)


@pytest.mark.contract("M13")
@kept
def test_large_results(tasks: int | None, batches_of: Callable[[int], None]) -> None:
    """Results may be of any length, together or alone."""
    batches_of(25)
    with Jobserver("fork", 2, max_tasks_per_child=tasks) as js:
        for number, found in enumerate(auto(js, big, [(n,) for n in range(50)])):
            assert found == big(number)


@pytest.mark.contract("M15")
@kept
def test_a_call_that_forks(tasks: int | None, batches_of: Callable[[int], None]) -> None:
    """When a call forks and returns twice, its batch goes on in the worker alone."""
    batches_of(6)
    with Jobserver("fork", 1, max_tasks_per_child=tasks) as js:
        assert list(auto(js, doubled, [(n, 2) for n in range(6)])) == list(range(6))


@pytest.mark.contract("S18", "M13")
@pytest.mark.parametrize("chunksize", ["auto", 5])
def test_too_few_descriptors(
    monkeypatch: pytest.MonkeyPatch, batches_of: Callable[[int], None], chunksize: Any
) -> None:
    """Without a descriptor for a batch those that run are waited for; if none does, OSError."""
    batches_of(5)
    most = 1
    made: list[Any] = []

    class Scarce(Ledger):
        def __init__(self, count: int) -> None:
            if sum(ledger.fd >= 0 for ledger in made) >= most:
                raise OSError(errno.EMFILE, "too many")
            super().__init__(count)
            made.append(self)

    monkeypatch.setattr(_batches, "Ledger", Scarce)
    with Jobserver("fork", 3) as js:
        results = js.map(identity, [(n,) for n in range(40)], chunksize=chunksize)
        assert list(results) == list(range(40))
        most = 0
        with pytest.raises(OSError, match="too many"):
            list(js.map(identity, [(n,) for n in range(40)], chunksize=chunksize))


@pytest.mark.contract("M13", "N3", "N6")
@pytest.mark.parametrize("lend", [False, True])
@kept
@swift
def test_inside_a_job(method: str, tasks: int | None, lend: bool) -> None:
    """A job may map over the pool that it runs in, with one slot too."""
    with Jobserver(method, 1, lend=lend, max_tasks_per_child=tasks) as js:
        found = js.submit(mapped_inside, args=(js, 60)).result(PATIENCE)
        assert found == list(range(60))


@pytest.mark.contract("M9", "M13")
@pytest.mark.parametrize("wrong", ["Auto", "", "1", None])
def test_other_words(wrong: Any) -> None:
    """A chunksize that is neither a positive int nor "auto" is refused at the call."""
    js = Jobserver("fork", 1)
    with pytest.raises((TypeError, ValueError)):
        js.map(identity, [(1,)], chunksize=wrong)


@pytest.mark.contract("M14", "M2")
@swift
def test_the_first_failure_of_several(method: str) -> None:
    """Of several calls that fail the first one in the order is told, after all results before."""
    with Jobserver(method, 3) as js:
        for good in (0, 1, 17, 80):
            found: list[int] = []
            argses = [(n, -1) for n in range(good)] + [(n, n) for n in range(good, good + 20)]
            with pytest.raises(LookupError, match=str(good)):
                found.extend(auto(js, fail_for, argses))
            assert found == list(range(good))
