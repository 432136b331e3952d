# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What a batch writes down: found by the submitter, whatever becomes of the worker."""

from __future__ import annotations

import os
import pickle
import signal
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import open_fds

from jobserver import _forking
from jobserver._wire import RAISED, RESULT
from jobserver._worker._chunk import Done, run_chunk
from jobserver._worker._ledger import Ledger, Record

if TYPE_CHECKING:
    from collections.abc import Iterator


def in_child(work: Callable[[], Any]) -> int:
    """Run `work` in a forked child that keeps all descriptors; its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """A ledger for ten calls."""
    made = Ledger(10)
    # A child of these tests is the worker.
    _forking.owned.discard(made.fd)
    yield made
    _forking.owned.add(made.fd)
    made.close()


def chunk(ledger: Ledger, fn: Callable[[int], Any], patience: float | None = 60.0) -> Done:
    """Make the calls fn(0), fn(1), ... here."""
    return run_chunk(fn, range(ledger.count), None, ledger, patience, True)


def found(ledger: Ledger) -> list[Any]:
    """All records; those of results without buffers as these results."""
    ends = ledger.ends()
    count = next((place for place, end in enumerate(ends) if not end), ledger.count)
    records = list(ledger.records(ends, 0, count))
    return [value(record) for record in records]


def value(record: Any) -> Any:
    """The result that a record is of, if it is of one without buffers."""
    if isinstance(record, bytes):
        return pickle.loads(record)
    if isinstance(record, Record) and record.kind == RESULT and len(record.segments) == 2:
        return pickle.loads(record.segments[1])
    return record


def mixed(number: int) -> Any:
    """Results of all sizes and kinds."""
    kinds: list[Any] = [
        None,
        1,
        "text",
        (1, [2]),
        b"",
        b"x" * 5000,
        "y" * 100_000,
        {},
        0.5,
        1 << 80,
    ]
    return kinds[number]


def test_results_of_all_kinds(ledger: Ledger) -> None:
    """Each call's result is found as it was when the call returned, however long it is."""
    assert os.waitstatus_to_exitcode(in_child(lambda: chunk(ledger, mixed))) == 0

    assert found(ledger) == [mixed(number) for number in range(10)]
    some = ledger.records(ledger.ends(), 4, 9)
    assert [value(record) for record in some] == [mixed(number) for number in range(4, 9)]


def test_very_long_results(ledger: Ledger) -> None:
    """What is too long to be held is read from the file, record by record."""
    done = in_child(lambda: chunk(ledger, lambda n: "z" * (n * 100_000) if n % 2 else None))
    assert done == 0
    assert ledger.records(ledger.ends(), 0, 10).data is None
    assert found(ledger) == ["z" * (n * 100_000) if n % 2 else None for n in range(10)]


class Buffered:
    """Offers its bytes out of band."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffered, (pickle.PickleBuffer(self.data),)


def test_buffers_are_not_pickled(ledger: Ledger) -> None:
    """A large buffer is beside the pickle, in memory that is the receiver's own."""
    assert in_child(lambda: chunk(ledger, lambda n: Buffered(bytearray(1 << 15)))) == 0
    record = found(ledger)[3]
    assert isinstance(record, Record)
    assert (record.kind, len(record.segments)) == (RESULT, 3)
    assert len(record.segments[1]) < 1000
    assert record.segments[2] == bytearray(1 << 15)


def test_long_results_keep_their_type(ledger: Ledger) -> None:
    """What is beside the pickle comes back as the bytes or the bytearray that it was."""
    kinds: list[Any] = [bytes, bytearray, memoryview]

    def long(number: int) -> Any:
        data = bytes([number]) * (1 << 20)
        return Buffered(bytearray(data)) if number % 3 == 2 else kinds[number % 3](data)

    assert in_child(lambda: chunk(ledger, long)) == 0
    for number, record in enumerate(found(ledger)):
        content = record.segments[2]
        assert type(content) is (bytes if number % 3 == 0 else bytearray)
        assert content == bytes([number]) * (1 << 20)


def test_failures_are_records_too(ledger: Ledger) -> None:
    """An exception is the record of its call, and the calls after it are made."""

    def fail(number: int) -> int:
        return 10 // (number - 2)

    assert in_child(lambda: chunk(ledger, fail)) == 0
    records = found(ledger)
    assert [records[n] for n in (0, 1, 3)] == [-5, -10, 10]
    assert (records[2].kind, len(records)) == (RAISED, 10)
    assert isinstance(pickle.loads(records[2].segments[1]), ZeroDivisionError)


def test_a_failure_ends_a_chunk_of_a_chosen_size(ledger: Ledger) -> None:
    """Where the user has chosen the size, what follows a failure is not made: it ends the map."""
    assert in_child(lambda: chunk(ledger, lambda n: 1 // (n - 2), None)) == 0
    assert len(found(ledger)) == 3


@pytest.mark.parametrize("how", ["kill", "exit", "raise"])
def test_an_end_in_a_call(ledger: Ledger, how: str) -> None:
    """However a worker ends in a call, all calls before it have their records, and it has none."""

    def end(number: int) -> int:
        if number == 4:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "exit":
                os._exit(1)
            raise SystemExit(1)
        return number

    assert not ledger.begun()
    assert in_child(lambda: chunk(ledger, end)) != 0
    assert found(ledger) == [0, 1, 2, 3]
    assert ledger.begun()


def test_calls_are_taken_from_a_running_worker(ledger: Ledger) -> None:
    """What a worker has not come near can be taken away; then it ends before that."""
    reader, writer = os.pipe()
    answer, asked = os.pipe()

    def wait(number: int) -> int:
        if number == 3:
            os.write(asked, b"?")
            os.read(reader, 1)
        return number

    pid = os.fork()
    if pid == 0:
        chunk(ledger, wait)
        os._exit(0)
    try:
        os.read(answer, 1)
        assert not ledger.take_away(3, 10)  # it is at that one
        assert ledger.take_away(7, 10)
        assert not ledger.take_away(1, 7)
        os.write(writer, b"!")
        assert os.waitpid(pid, 0)[1] == 0
        assert found(ledger) == [0, 1, 2, 3, 4, 5, 6]
    finally:
        for fd in (reader, writer, answer, asked):
            os.close(fd)


def test_what_was_taken_stays_taken(ledger: Ledger) -> None:
    """The submitter may let go of the ledger before the worker comes to what was taken away."""
    assert ledger.take_away(6, 10)
    os.close(os.dup(ledger.fd))  # which ends all of this process's locks
    assert in_child(lambda: chunk(ledger, lambda n: n)) == 0
    assert found(ledger) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_is_taken_twice_from_the_dead(ledger: Ledger, killed: bool) -> None:
    """A worker that has ended holds no locks; what it was at cannot be taken all the same."""

    def end(number: int) -> int:
        if number == 4 and killed:
            os._exit(1)
        return number

    in_child(lambda: chunk(ledger, end))
    assert not ledger.take_away(4, 10)
    assert ledger.take_away(5, 10) is killed


def test_a_long_chunk_gives_the_rest_back(ledger: Ledger) -> None:
    """Past its patience a worker begins no call any more, and says how far it has come."""
    reader, writer = os.pipe()

    def work() -> None:
        os.write(writer, str(chunk(ledger, lambda n: n, patience=-1.0).made).encode())

    assert in_child(work) == 0
    assert os.read(reader, 9) == b"1"
    assert found(ledger) == [0]
    os.close(reader)
    os.close(writer)


def test_a_copy_of_the_worker_makes_no_calls(ledger: Ledger) -> None:
    """A call that forks and returns in the child, too, ends the child there."""
    reader, writer = os.pipe()

    def fork(number: int) -> int:
        os.write(writer, b"x")
        if number == 3 and os.fork() == 0:
            return -1
        return number

    assert in_child(lambda: chunk(ledger, fork)) == 0
    os.close(writer)
    with open(reader, "rb") as calls:
        assert len(calls.read()) == 10
    assert found(ledger) == list(range(10))


def test_a_ledger_is_not_inherited() -> None:
    """A process that is forked meanwhile has no part in it, and closes nothing by letting go."""
    ledger = Ledger(1)

    def work() -> None:
        assert ledger.fd not in open_fds()
        other = os.open(os.devnull, os.O_RDONLY)
        os.dup2(other, ledger.fd)
        ledger.close()
        os.fstat(ledger.fd)

    assert in_child(work) == 0
    ledger.close()
    ledger.close()


def test_a_ledger_is_closed_once_it_is_handed_over() -> None:
    """Letting go while the worker is being started waits until it has its own hold."""
    ledger = Ledger(1)
    with ledger.handed_over():
        ledger.close()
        fd = ledger.fd
        os.fstat(fd)
    assert ledger.fd == -1
    with pytest.raises(OSError):
        os.fstat(fd)


def test_a_ledger_does_not_travel_alone() -> None:
    """Outside of the arguments of a job it cannot be pickled."""
    ledger = Ledger(1)
    with pytest.raises(TypeError, match="worker"):
        pickle.dumps(ledger)
    ledger.close()
