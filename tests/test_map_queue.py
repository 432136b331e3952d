# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobserver.map with single calls and warm workers, which take the calls from a queue."""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    free_slots,
    getenv,
    identity,
    lines,
    open_fds,
    run_program,
    settle,
    wait_until,
)
from jobs import enter_if, fail_for
from map_jobs import (
    Telltale,
    end_for,
    mapped_inside,
    meet,
    note,
    note_and_enter_if,
    odd_result,
    open_last,
    pid_for,
    soft_exit_result,
    through,
)

from jobserver import Jobserver, SubmissionDied
from jobserver._calls import Drain
from jobserver._worker import _queue

#: More than are handed over one by one.
CROWD = 60

pytestmark = pytest.mark.contract("M18")


def warm(method: str, slots: int, **more: Any) -> Jobserver:
    """A Jobserver whose workers may run any number of jobs."""
    return Jobserver(method, slots, max_tasks_per_child=None, **more)


@pytest.mark.contract("M2", "M7")
@pytest.mark.parametrize("buffersize", [None, 1, 25])
def test_values_in_order(method: str, buffersize: int | None) -> None:
    """Every call gives its value, in the order of the inputs."""
    with warm(method, 2) as js:
        found = js.map(identity, [(n,) for n in range(CROWD)], buffersize=buffersize)
        assert list(found) == list(range(CROWD))


def test_workers_are_those_of_the_slots(method: str) -> None:
    """However many calls there are, no more processes make them than there are slots."""
    with warm(method, 2) as js:
        found = set(js.map(pid_for, [(n,) for n in range(5 * CROWD)]))
        assert os.getpid() not in found
        assert len(found) <= 2


@pytest.mark.contract("M7")
def test_inputs_are_read_as_needed() -> None:
    """An infinite iterable works, of which only as much is read as may be outstanding."""
    numbers = itertools.count()
    with warm("fork", 2) as js:
        results = js.map(identity, ((n,) for n in numbers), buffersize=30)
        assert list(itertools.islice(results, CROWD)) == list(range(CROWD))
        assert next(numbers) <= CROWD + 30
        results.close()  # type: ignore[attr-defined]
        assert js.submit(identity, args=(1,)).result(PATIENCE) == 1


@pytest.mark.contract("M7")
def test_inputs_that_wait_for_calls(tmp_path: Path) -> None:
    """An iterable may wait for calls of what it has given: all are begun before it goes on."""
    log = tmp_path / "log"

    def inputs() -> Iterator[tuple[str, int]]:
        for start in range(0, CROWD, 20):
            yield from ((str(log), n) for n in range(start, start + 20))
            wait_until(lambda: len(lines(log)) == start + 20, "the calls before")  # noqa: B023

    with warm("fork", 2) as js:
        assert list(js.map(note, inputs(), buffersize=CROWD)) == list(range(CROWD))


@pytest.mark.contract("M7")
def test_all_room_is_used(tmp_path: Path) -> None:
    """As many calls as may be outstanding are, if there are slots: so they may wait for others."""
    with warm("fork", 5) as js:
        inputs = [(str(tmp_path), n, 1, 4) for n in range(8)]
        results = js.map(meet, inputs, buffersize=4, timeout=PATIENCE)
        assert list(results) == list(range(8))


@pytest.mark.contract("S14")
def test_environment_of_the_handle_overridden() -> None:
    """With an empty one for the map, calls get none of the handle's."""
    with warm("fork", 2, env={"FOR_ALL": "1"}) as js:
        found = js.map(getenv, [("FOR_ALL",)] * CROWD, env={})
        assert list(found) == [[None]] * CROWD


@pytest.mark.contract("M3")
def test_keyword_arguments() -> None:
    """Each call gets the keyword arguments that are its own."""
    with warm("fork", 2) as js:
        found: Iterator[dict[str, int]] = js.map(dict, None, [{"number": n} for n in range(CROWD)])
        assert list(found) == [{"number": n} for n in range(CROWD)]


def test_what_cannot_be_pickled_is_forked(gate: Gate) -> None:
    """Functions that only a forked worker can have are called all the same."""
    with warm("fork", 2) as js:
        found = js.map(lambda n: n + 1, [(n,) for n in range(CROWD)])
        assert list(found) == list(range(1, CROWD + 1))
        settle(js)
        assert free_slots(js, gate) == 2


@pytest.mark.contract("M2", "S19")
def test_input_that_cannot_be_pickled() -> None:
    """Its error comes in its turn, and names the start method."""
    inputs: list[tuple[Any]] = [(n,) for n in range(CROWD)]
    inputs[40] = (threading.Lock(),)
    with warm("forkserver", 2) as js:
        results = js.map(identity, inputs)
        assert list(itertools.islice(results, 40)) == list(range(40))
        with pytest.raises(TypeError, match="forkserver"):
            next(results)


@pytest.mark.contract("M4")
@pytest.mark.parametrize("tasks", [1, None])
def test_inputs_that_fail(tasks: int | None, gate: Gate) -> None:
    """What an iterable raises is told as soon as it is known, after results that are there."""

    def inputs() -> Any:
        yield from ((gate, False), (gate, True))
        raise LookupError("no more")

    with Jobserver("fork", 2, max_tasks_per_child=tasks) as js:
        found: list[bool] = []
        with pytest.raises(LookupError, match="no more"):
            found.extend(js.map(enter_if, inputs(), buffersize=CROWD))
        assert found in ([], [False])
        gate.open()
        settle(js)


@pytest.mark.contract("M2")
def test_exception_comes_in_its_turn(method: str, gate: Gate) -> None:
    """A call that fails ends the iteration when it is its turn, with the results before it."""
    with warm(method, 2) as js:
        results = js.map(fail_for, [(n, 40) for n in range(CROWD)])
        assert list(itertools.islice(results, 40)) == list(range(40))
        with pytest.raises(LookupError, match="40"):
            next(results)
        assert list(results) == []
        settle(js)
        assert free_slots(js, gate) == 2


@pytest.mark.contract("M2", "F11")
def test_result_that_cannot_be_pickled() -> None:
    """Its error comes in its turn, and names the result's own type."""
    with warm("fork", 2) as js:
        results = js.map(odd_result, [(n, 40) for n in range(CROWD)])
        assert list(itertools.islice(results, 40)) == list(range(40))
        with pytest.raises(RuntimeError, match=r"a _thread\.lock, could not be pickled"):
            next(results)


@pytest.mark.contract("M2", "F11")
def test_result_that_ends_who_unpickles_it() -> None:
    """That it cannot be unpickled is told in its turn, whatever it raises."""
    with warm("fork", 2) as js:
        results = js.map(soft_exit_result, [(n, 40) for n in range(CROWD)])
        assert list(itertools.islice(results, 40)) == list(range(40))
        with pytest.raises(RuntimeError, match="cannot be unpickled here: SystemExit"):
            next(results)


def test_results_are_unpickled_in_their_turn() -> None:
    """Code of the user's that unpickles a result runs when that is asked for."""
    with warm("fork", 2) as js:
        Telltale.seen.clear()
        for n, result in enumerate(js.map(Telltale, [(n,) for n in range(CROWD)])):
            assert result.number == n
            assert Telltale.seen == list(range(n + 1))


@pytest.mark.contract("F9")
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_death_is_that_of_its_call(method: str, how: str, tmp_path: Path, gate: Gate) -> None:
    """A worker that dies fails the call that it was at; those before it and after it are made."""
    log = tmp_path / "log"
    with warm(method, 2) as js:
        results = js.map(end_for, [(str(log), n, 40, how) for n in range(CROWD)])
        assert list(itertools.islice(results, 40)) == list(range(40))
        with pytest.raises(SubmissionDied):
            next(results)
        settle(js)
        assert free_slots(js, gate) == 2


def test_call_that_was_claimed_and_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gate: Gate
) -> None:
    """What a worker had claimed when it was killed is made by another one while a call lasts."""
    claim, may_claim, log = _queue.Queue.claim, Drain.may_claim, tmp_path / "log"
    asked: list[Drain] = []

    def die_once(queue: _queue.Queue) -> tuple[int, int, int] | None:
        found = claim(queue)
        if found is not None and found[0] == CROWD and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    def may_claim_at_first(drain: Drain) -> bool:
        asked.append(drain)
        return len(asked) == 1 or may_claim(drain)

    def open_when_all_have_begun() -> None:
        wait_until(lambda: len(lines(log)) == CROWD, "all calls")
        gate.open()

    monkeypatch.setattr(_queue.Queue, "claim", die_once)
    monkeypatch.setattr(Drain, "may_claim", may_claim_at_first)
    with warm("fork", 2) as js:
        results = js.map(note_and_enter_if, [(str(log), n, gate, 0) for n in range(CROWD)])
        opener = threading.Thread(target=open_when_all_have_begun)
        opener.start()
        assert list(results) == list(range(CROWD))
        opener.join()
        assert (tmp_path / "died").exists()


@pytest.mark.contract("M11", "M12")
def test_leaving_early(method: str, tmp_path: Path, gate: Gate) -> None:
    """What no worker has begun when the iteration is left is not made, and its slots come back."""
    log = tmp_path / "log"
    with warm(method, 1) as js:
        results = js.map(note_and_enter_if, [(str(log), n, gate, 20) for n in range(CROWD)])
        assert list(itertools.islice(results, 20)) == list(range(20))
        gate.await_entered(1)
        results.close()  # type: ignore[attr-defined]
        gate.open()
        assert js.submit(identity, args=(5,)).result(PATIENCE) == 5
        assert sorted(map(int, lines(log))) == list(range(21))


def enter_both(js: Jobserver, gate: Gate) -> list[int]:
    """The processes of two workers, which are at rest thereafter."""
    futures = [js.submit(gate.enter) for _ in range(2)]
    gate.await_entered(2)
    gate.open()
    return [future.result(PATIENCE) for future in futures]


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker that has begun make all calls, and leave none to one that is stopped."""
    monkeypatch.setattr(_queue, "_LASTS", PATIENCE)
    monkeypatch.setattr(_queue, "_SHORT", PATIENCE)


def test_no_call_waits_for_a_worker_that_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Calls are made on the other slot while a worker that was to make some is stopped."""
    monkeypatch.setattr(_queue, "_SHORT", -1)  # each call ends its drain
    with warm("fork", 2) as js:
        late = enter_both(js, gate)[0]
        os.kill(late, signal.SIGSTOP)
        try:
            results = js.map(identity, [(n,) for n in range(CROWD)], timeout=PATIENCE)
            assert list(itertools.islice(results, CROWD)) == list(range(CROWD))
        finally:
            os.kill(late, signal.SIGCONT)
        assert list(results) == []


@pytest.mark.contract("S18")
@pytest.mark.usefixtures("lasting")
def test_slots_are_free_after_the_last_result(make_gate: Callable[[], Gate]) -> None:
    """The end of the iteration waits for a worker that came too late to find anything to do."""
    with warm("fork", 2) as js:
        late = enter_both(js, make_gate())[0]
        os.kill(late, signal.SIGSTOP)
        results = js.map(identity, [(n,) for n in range(CROWD)], timeout=PATIENCE)
        assert list(itertools.islice(results, CROWD)) == list(range(CROWD))
        timer = threading.Timer(0.3, os.kill, (late, signal.SIGCONT))
        timer.start()
        assert list(results) == []
        assert free_slots(js, make_gate()) == 2
        timer.join()


@pytest.mark.contract("H12")
@pytest.mark.usefixtures("lasting")
def test_dropped_when_all_has_been_yielded(gate: Gate) -> None:
    """A worker that has not found out that there is nothing to do is no running Future."""
    js = warm("fork", 2)
    late = enter_both(js, gate)[0]
    os.kill(late, signal.SIGSTOP)
    results = js.map(identity, [(n,) for n in range(CROWD)])
    assert list(itertools.islice(results, CROWD)) == list(range(CROWD))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del js, results
        gc.collect()
    os.kill(late, signal.SIGCONT)
    assert warned == []


def test_results_do_not_wait_for_the_next_call(method: str, gate: Gate) -> None:
    """What is made before a call that lasts is yielded while that lasts."""
    with warm(method, 1) as js:
        inputs = [(gate, n == 30) for n in range(CROWD)]
        results = js.map(enter_if, inputs, timeout=PATIENCE)
        assert list(itertools.islice(results, 30)) == [False] * 30
        gate.open()
        assert list(results) == [True] + [False] * (CROWD - 31)


def test_calls_do_not_wait_for_one_that_lasts(method: str, gate: Gate) -> None:
    """While one worker is at a call that lasts, the calls after it are made on the other slot."""
    with warm(method, 2) as js:
        inputs = [(gate, n == 0, CROWD - 1) for n in range(CROWD)]
        results = js.map(open_last, inputs, timeout=PATIENCE)
        assert list(results) == [True] + [False] * (CROWD - 1)


@pytest.mark.contract("M10")
def test_timeout(gate: Gate, make_gate: Callable[[], Gate]) -> None:
    """Past the timeout the iterator raises, after what was there before."""
    with warm("fork", 1) as js:
        results = js.map(enter_if, [(gate, n == 30) for n in range(CROWD)], timeout=0.5)
        with pytest.raises(concurrent.futures.TimeoutError):
            list(results)
        gate.open()
        settle(js)
        assert free_slots(js, make_gate()) == 1


@pytest.mark.contract("N3", "K5")
def test_beside_a_slot_that_is_held() -> None:
    """A thread that holds the only slot lends it to the calls, whenever it has taken it."""
    with warm("fork", 1) as js:
        with js.slot():
            assert list(js.map(identity, [(n,) for n in range(CROWD)])) == list(range(CROWD))
        results = js.map(identity, [(n,) for n in range(2 * CROWD)])
        assert next(results) == 0
        with js.slot():
            assert list(results) == list(range(1, 2 * CROWD))


@pytest.mark.contract("N3")
def test_inside_a_job(method: str) -> None:
    """A job on the only slot maps, too."""
    with warm(method, 1) as js:
        assert js.submit(mapped_inside, args=(js, CROWD)).result(PATIENCE) == list(range(CROWD))


@pytest.mark.contract("H13")
def test_from_many_threads(gate: Gate) -> None:
    """Maps of several threads share the slots, and each gets its own results."""
    found: dict[int, list[int]] = {}

    def run(start: int) -> None:
        numbers = range(start, start + 4 * CROWD)
        found[start] = list(js.map(identity, [(n,) for n in numbers]))

    with warm("fork", 2) as js:
        threads = [threading.Thread(target=run, args=(1000 * n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {1000 * n: list(range(1000 * n, 1000 * n + 4 * CROWD)) for n in range(4)}
        settle(js)
        assert free_slots(js, gate) == 2


def test_maps_in_turn() -> None:
    """Two maps on one slot may be iterated over in turn."""
    with warm("fork", 1) as js:
        one, two = (js.map(identity, [(n,) for n in range(CROWD)]) for _ in range(2))
        assert list(zip(one, two)) == [(n, n) for n in range(CROWD)]


def test_closed_amid_the_iteration() -> None:
    """What is still to be started when the Jobserver is closed fails with RuntimeError."""
    js = warm("fork", 1)
    with js:
        results = js.map(identity, [(n,) for n in range(20 * CROWD)])
        assert next(results) == 0
    with pytest.raises(RuntimeError, match="closed"):
        list(results)


def test_closed_when_all_has_been_started(gate: Gate) -> None:
    """What runs when the Jobserver is closed still gives its result."""
    js = warm("fork", 2)
    with js:
        results = js.map(through, [(gate, n, 1) for n in range(2)])
        assert next(results) == 0
        gate.await_entered(1)
    gate.open()
    assert list(results) == [1]


@pytest.mark.contract("S18")
def test_no_descriptor_for_half_a_drain() -> None:
    """Where there is a descriptor for a ledger and none to map it by, none is left behind."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = open_fds()
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1, hard))
    try:
        with pytest.raises(OSError, match="open files"):
            Drain()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_fds() == before


def test_forked_amid_the_iteration() -> None:
    """In a process that is forked meanwhile the iteration cannot go on, and says so."""
    with warm("fork", 1) as js:
        results = js.map(identity, [(n,) for n in range(20 * CROWD)])
        assert next(results) == 0
        child = os.fork()
        if child == 0:
            try:
                list(results)
            except RuntimeError as error:
                os._exit(7 if "forked" in str(error) or "closed" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert list(results) == list(range(1, 20 * CROWD))
        settle(js)


STORM = """
import gc, random, signal, sys
from pathlib import Path
from jobserver import Jobserver
from helpers import Gate, free_slots, identity, rested_fds, settle

def interrupt(signum, frame):
    raise KeyboardInterrupt

if __name__ == "__main__":
    method, rounds, directory = sys.argv[1:]
    random.seed(1)
    signal.signal(signal.SIGALRM, interrupt)
    js = Jobserver(method, 2, max_tasks_per_child=None)
    inputs = [(n,) for n in range(60)]
    assert list(js.map(identity, inputs)) == list(range(60))
    wrong, expected = set(), set(range(60))
    before = rested_fds(js)
    caught = 0
    for _ in range(int(rounds)):
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 8e-3))
            while True:
                # Not an assert: from Python 3.12 on the jump back after a condition that ends a
                # loop is outside of the try, and that is where handlers run.
                wrong.update(set(js.map(identity, inputs)) ^ expected)
        except KeyboardInterrupt:
            caught += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert not wrong
    gc.collect()  # one that comes amid a `finally` leaves the rest of that to the collector
    grown = rested_fds(js) - before
    settle(js)
    print(caught, free_slots(js, Gate(Path(directory))), grown)
"""


@pytest.mark.contract("S18")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_storm_of_interrupts(method: str, tmp_path: Path, gate: Gate) -> None:
    """Interrupts at random moments of a map lose no slot and no descriptor."""
    script = tmp_path / "program.py"
    script.write_text(STORM)
    done = run_program([str(script), method, "150", gate.directory], timeout=100)
    assert (done.stdout, done.stderr) == ("150 2 0\n", "")
