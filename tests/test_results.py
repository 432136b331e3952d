# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Results and exceptions on their way back: sizes, and everything that can go wrong."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_answer,
    chain_text,
    free_slots,
    identity,
    resident_bytes,
    run_program,
    sleep,
)
from jobs_results import (
    ExitsWhenPickled,
    Frozen,
    NeedsTwo,
    RaisesWhenPickled,
    RaisesWhenUnpickled,
    UnspeakableWhenPickled,
    UnspeakableWhenUnpickled,
    block,
    deep_list,
    give,
    nested_failure,
    raise_becomes_text,
    raise_frozen,
    raise_local,
    raise_needs_two,
    raise_result,
    raise_with_group,
    raise_with_unpicklable,
    unspeakable,
)
from marks import by_method

from jobserver import Jobserver, SubmissionDied


@pytest.mark.contract("F6")
@pytest.mark.parametrize(
    "size",
    [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, (1 << 20) - 1, 1 << 20, (1 << 20) + 1],
)
def test_sizes(size: int) -> None:
    """Results of any size arrive whole, around all the sizes of pipes and buffers."""
    js = Jobserver("fork", 1)

    assert js.submit(block, args=(size,)).result(PATIENCE) == block(size)


@pytest.mark.contract("F6")
@by_method("size", [65537, 0, 65535, 65536])
def test_sizes_with_every_method(method: str, size: int) -> None:
    """Results around the size of a pipe arrive whole under each start method."""
    with Jobserver(method, 1) as js:
        assert js.submit(block, args=(size,)).result(PATIENCE) == block(size)


@pytest.mark.contract("F6")
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "list"])
def test_hundred_megabytes(kind: str) -> None:
    """A result of 100 MB arrives whole."""
    js = Jobserver("fork", 1)
    size = 100_000_000 if kind != "list" else 2_000_000
    value = js.submit(give, args=(kind, size)).result(PATIENCE)

    assert type(value).__name__ == kind
    assert len(value) == size
    if kind == "bytearray":
        value[0] = 7
    assert value[-1] == (size - 1 if kind == "list" else 0)


@pytest.mark.slow
@pytest.mark.contract("F6")
@pytest.mark.parametrize("kind", ["bytes", "bytearray"])
def test_more_than_four_gigabytes(method: str, kind: str) -> None:
    """A result of more than 4 GB arrives whole."""
    size = (4 << 30) + 17
    with Jobserver(method, 1) as js:
        value = js.submit(give, args=(kind, size)).result(300)

    assert len(value) == size
    assert hashlib.blake2b(value[-100:]).digest() == hashlib.blake2b(bytes(100)).digest()


@pytest.mark.slow
@pytest.mark.contract("S2")
def test_arguments_of_more_than_four_gigabytes(method: str) -> None:
    """Arguments of more than 4 GB arrive whole."""
    size = (4 << 30) + 17
    with Jobserver(method, 1) as js:
        assert js.submit(len, args=(bytes(size),)).result(300) == size


@pytest.mark.contract("F6", "S15")
def test_large_results_of_many_jobs_at_once() -> None:
    """Workers that have more to say than a pipe holds do not wait for each other."""
    js = Jobserver("fork", 4)
    futures = [js.submit(block, args=(3_000_000 + n,)) for n in range(4)]

    for number, future in reversed(list(enumerate(futures))):
        assert len(future.result(PATIENCE)) == 3_000_000 + number


@pytest.mark.contract("S3", "S15", "F6")
def test_large_unclaimed_results_do_not_block_slots() -> None:
    """A result that nobody has asked for yet does not keep its slot."""
    js = Jobserver("fork", 1)
    futures = [js.submit(block, args=(3_000_000,), timeout=PATIENCE) for _ in range(3)]

    assert [len(future.result(PATIENCE)) for future in futures] == [3_000_000] * 3


@pytest.mark.contract("F6")
def test_deeply_nested_result() -> None:
    """A result nested as deep as pickle can go arrives."""
    js = Jobserver("fork", 1)
    value, depth = js.submit(deep_list, args=(200,)).result(PATIENCE), 0
    while value:
        value, depth = value[0], depth + 1

    assert depth == 200


@pytest.mark.contract("F11", "F12", "S18")
@by_method("kind", ["RaisesWhenPickled", "lambda", "lock", "generator", "too deep"])
def test_results_that_cannot_be_pickled(method: str, gate: Gate, kind: str) -> None:
    """An unpicklable result is a RuntimeError that says so and why; again and again."""
    with Jobserver(method, 1) as js:
        future = js.submit(give, args=(kind, 0))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="result") as caught:
                future.result(PATIENCE)
            text = chain_text(caught.value)
            assert "pickle" in text
            if kind == "RaisesWhenPickled":
                assert "pickled too early" in text
                assert "__reduce__" in text
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("F11", "S18")
def test_results_that_cannot_be_unpickled(method: str, gate: Gate) -> None:
    """A result that fails to load here is a RuntimeError that says which and why."""
    with Jobserver(method, 1) as js:
        future = js.submit(give, args=("RaisesWhenUnpickled", 0))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="result") as caught:
                future.result(PATIENCE)
            assert "unpickled too late" in chain_text(caught.value)
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("F11", "F12", "F7", "S19")
@by_method("kind", [UnspeakableWhenPickled, UnspeakableWhenUnpickled])
def test_failures_that_cannot_be_shown(method: str, kind: type) -> None:
    """That pickling has failed is told also where the repr of the reason fails."""
    with Jobserver(method, 1) as js:
        for job, what in ((give, "result"), (raise_result, "exception")):
            future = js.submit(job, args=(kind.__name__, 0)[: 2 if job is give else 1])
            for _ in range(2):
                with pytest.raises(RuntimeError, match=f"{what}.*Unspeakable"):
                    future.result(PATIENCE)
        if method != "fork":
            with pytest.raises((TypeError, RuntimeError), match=r"job.*Unspeakable"):
                js.submit(identity, args=(kind(),)).result(PATIENCE)


@pytest.mark.contract("H3")
def test_callback_error_that_cannot_be_shown() -> None:
    """Leaving the with-block warns of a callback's error also where its repr fails."""
    js = Jobserver("fork", 1)
    js.__enter__()
    future = js.submit(identity, args=(1,))
    future.when_done(unspeakable)
    await_answer(future)
    with pytest.warns(RuntimeWarning, match="Unspeakable"):
        js.__exit__(None, None, None)


@pytest.mark.contract("F9", "F10", "S18")
def test_results_that_kill_the_worker(method: str, gate: Gate) -> None:
    """A result whose pickling ends the worker is a SubmissionDied with the exit status."""
    with Jobserver(method, 1) as js:
        future = js.submit(give, args=("ExitsWhenPickled", 0))
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        assert caught.value.exitcode == 17
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("F11")
def test_result_that_raises_system_exit_when_unpickled() -> None:
    """Even sys.exit in the unpickling of a result does not end the caller."""
    js = Jobserver("fork", 1)
    future = js.submit(give, args=("SoftExitWhenUnpickled", 0))

    with pytest.raises(RuntimeError, match="result"):
        future.result(PATIENCE)


@pytest.mark.contract("F11", "F7", "S18")
@by_method("job", [raise_needs_two, raise_with_unpicklable, raise_local, raise_becomes_text])
def test_exceptions_that_cannot_travel(method: str, gate: Gate, job: Any) -> None:
    """An exception that cannot be rebuilt here is a RuntimeError that keeps the traceback."""
    with Jobserver(method, 1) as js:
        future = js.submit(job)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="exception") as caught:
                future.result(PATIENCE)
            text = chain_text(caught.value)
            assert f"in {job.__name__}" in text
            assert "the message" in text
        del caught
        assert free_slots(js, gate) == 1


@pytest.mark.contract("F11", "F7")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (RaisesWhenPickled, "pickled too early"),
        (RaisesWhenUnpickled, "unpickled too late"),
    ],
)
def test_exceptions_that_fail_on_their_way(method: str, value: type, expected: str) -> None:
    """An exception that carries something bad is a RuntimeError that says what was bad."""
    with Jobserver(method, 1) as js:
        future = js.submit(raise_result, args=(value.__name__,))
        with pytest.raises(RuntimeError, match="exception") as caught:
            future.result(PATIENCE)
    text = chain_text(caught.value)

    assert expected in text
    assert "in raise_result" in text


@pytest.mark.contract("F9", "F10")
def test_exceptions_that_kill_the_worker(method: str) -> None:
    """An exception whose pickling ends the worker is a SubmissionDied."""
    with Jobserver(method, 1) as js:
        future = js.submit(raise_result, args=(ExitsWhenPickled.__name__,))
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)

    assert caught.value.exitcode == 17


@pytest.mark.contract("F7")
def test_custom_exception_that_can_travel() -> None:
    """An exception with attributes and a good __reduce__ arrives with them."""
    js = Jobserver("fork", 1)
    with pytest.raises(NeedsTwo) as caught:
        js.submit(raise_needs_two, args=(True,)).result(PATIENCE)

    assert (caught.value.first, caught.value.second) == ("the message", 2)


@pytest.mark.contract("F7")
def test_exception_that_refuses_to_be_changed() -> None:
    """An exception whose attributes cannot be set arrives, with the worker's traceback."""
    js = Jobserver("fork", 1)
    with pytest.raises(Frozen) as caught:
        js.submit(raise_frozen).result(PATIENCE)

    assert caught.value.first == "the message"
    assert "in raise_frozen" in str(caught.value.__cause__)


@pytest.mark.contract("F7")
def test_exception_with_notes_or_group() -> None:
    """What the interpreter knows of exceptions (notes, groups) comes through."""
    js = Jobserver("fork", 1)
    with pytest.raises(Exception, match="several") as caught:
        js.submit(raise_with_group).result(PATIENCE)
    text = chain_text(caught.value)

    assert "first of several" in text


@pytest.mark.contract("F7", "H6")
def test_exception_from_two_levels_down(method: str) -> None:
    """An exception that passes two levels shows the traceback of each."""
    with Jobserver(method, 2) as js, pytest.raises(ZeroDivisionError) as caught:
        js.submit(nested_failure, args=(js,)).result(PATIENCE)
    text = chain_text(caught.value)

    assert "in divide_deeply" in text
    assert "in nested_failure" in text


@pytest.mark.contract("F11")
def test_unpickling_that_ends_the_caller() -> None:
    """A result that calls os._exit when loaded ends the caller as it says, without a hang."""
    done = run_program(
        [
            "-c",
            "from jobserver import Jobserver\n"
            "from jobs_results import give\n"
            "js = Jobserver('fork', 1)\n"
            "js.submit(give, args=('ExitsWhenUnpickled', 0)).result()\n"
            "print('not reached')",
        ]
    )

    assert (done.returncode, done.stdout, done.stderr) == (18, "", "")


@pytest.mark.contract("F12", "F23")
def test_result_in_many_threads_is_one_object() -> None:
    """All threads get the very same object."""
    js = Jobserver("fork", 1)
    future = js.submit(identity, args=([1],))
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(future.result())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)

    assert len(got) == 8
    assert all(value is got[0] for value in got)


@pytest.mark.contract("F6", "F26")
def test_memory_of_results_is_freed() -> None:
    """A large result belongs to the Future: when both are gone, so is the memory."""
    js = Jobserver("fork", 1)
    js.submit(block, args=(50_000_000,)).result(PATIENCE)
    before = resident_bytes()
    for _ in range(4):
        future = js.submit(block, args=(50_000_000,))
        assert len(future.result(PATIENCE)) == 50_000_000
        del future

    assert resident_bytes() - before < 50_000_000


@pytest.mark.contract("F6")
def test_result_waits_for_a_slow_answer() -> None:
    """A result in several parts, late and large, is complete when result() returns."""
    js = Jobserver("fork", 2)
    slow, large = js.submit(sleep, args=(0.2,)), js.submit(block, args=(5_000_000,))

    assert slow.result(PATIENCE) == 0.2
    assert len(large.result(PATIENCE)) == 5_000_000
