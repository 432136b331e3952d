# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The slot pool by itself: no token is ever lost or doubled, whoever is killed, and when."""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any, Callable, Optional

import pytest
from helpers import process_state, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import die_at

from jobserver import _forking
from jobserver._slots._lease import Lease
from jobserver._slots._pool import SlotPool
from jobserver._slots._section import Section, lock

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 3

pytestmark = pytest.mark.filterwarnings(
    "ignore:It looks like `register_random`:hypothesis.errors.HypothesisWarning"
)


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    """A pool that is closed when the test ends."""
    made = SlotPool.create(SLOTS)
    yield made
    made.close()


def take(pool: SlotPool) -> Lease:
    """A lease, which there must be."""
    lease = pool.try_take()
    assert lease is not None
    return lease


def lent(lease: Lease) -> Lease:
    """What is lent of a lease, which must be there."""
    moved = lease.relocated()
    assert moved is not None
    return moved


def in_child(action: Callable[[], Any]) -> int:
    """Run an action in a forked process, which ends with it; its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    finally:
        os._exit(status)


def worker_on(lease: Lease) -> int:
    """A process that shares a lease, and stays; its fork hooks have run."""
    reader, writer = os.pipe()
    pid = _forking.fork((lease.fileno(),))
    if not pid:
        try:
            signal.alarm(60)
            os.write(writer, b"!")
            signal.pause()
        finally:
            os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return pid


def reap(pid: int) -> int:
    """Wait for a child; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert reap(pid) == -signal.SIGKILL


# Taking and giving back


def test_every_slot_can_be_taken_once(pool: SlotPool) -> None:
    """There are as many leases as slots, each on a berth of its own."""
    leases = [take(pool) for _ in range(SLOTS)]

    assert pool.try_take() is None
    assert pool.free() == 0
    assert len({lease.berth for lease in leases}) == SLOTS

    for lease in leases:
        lease.release()
    assert pool.free() == SLOTS


def test_release_is_once(pool: SlotPool) -> None:
    """Releasing again, or abandoning what is released, changes nothing."""
    lease = take(pool)
    lease.release()
    lease.release()
    lease.abandon()

    assert pool.free() == SLOTS


def test_forgotten_lease_goes_back(pool: SlotPool) -> None:
    """A lease that nobody refers to any more puts its token back."""
    lease = take(pool)
    assert pool.free() == SLOTS - 1
    del lease
    assert pool.free() == SLOTS


def test_relocated_lease(pool: SlotPool) -> None:
    """A lent token lies in another berth, and who shared the first lock has no part in it."""
    lease = take(pool)
    shared = os.dup(lease.fileno())
    berth = lease.berth
    moved = lent(lease)

    assert moved.berth != berth
    assert pool.free() == SLOTS - 1
    lease.release()  # spent
    assert pool.free() == SLOTS - 1
    moved.abandon()
    assert pool.sweep() == 1  # though `shared` is open
    assert pool.free() == SLOTS
    os.close(shared)


@pytest.fixture
def tight() -> Iterator[SlotPool]:
    """A pool that has a berth for each slot and no more, as when descriptors are scarce."""
    made = SlotPool.create(SLOTS)
    (section,) = made.sections
    made.sections = [Section(section.pipe, section.berths[:SLOTS], 0)]
    yield made
    made.sections = [section]
    made.close()


def test_lent_where_it_lies(tight: SlotPool) -> None:
    """Without a free berth a token stays in its own, where the borrower's death still frees it."""
    leases = [take(tight) for _ in range(SLOTS)]
    submitters = tight.adopt(os.dup(leases[0].fileno()), 0, leases[0].berth)
    moved = lent(leases[0])

    assert moved.berth == submitters.berth
    assert not submitters.reclaim()  # as if the lender had died: the borrower has it
    assert tight.sweep() == 0

    moved.abandon()  # as if the borrower, too
    assert tight.sweep() == 1
    assert tight.free() == 1
    for lease in (submitters, *leases):
        lease.release()
    assert tight.free() == SLOTS


def test_swept_while_it_is_lent_where_it_lies(
    tight: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that is swept between the two locks is in the pool, and lent to nobody."""
    leases = [take(tight) for _ in range(SLOTS)]

    def lock_late(fd: int) -> bool:
        monkeypatch.undo()
        assert tight.sweep() == 1
        return lock(fd)

    monkeypatch.setattr(Section, "relocate", lambda self, parked: None)
    monkeypatch.setattr("jobserver._slots._section.lock", lock_late)
    assert leases[0].relocated() is None
    assert tight.free() == 1
    for lease in leases:
        lease.release()  # the first is spent
    assert tight.free() == SLOTS


def test_reclaim(pool: SlotPool) -> None:
    """A dead worker's token is its submitter's while it lies where it was, and only then."""
    lease = take(pool)
    theirs = pool.adopt(os.dup(lease.fileno()), *lease.place)
    assert lease.reclaim()
    moved = lent(theirs)

    assert not lease.reclaim()

    lease.abandon()
    moved.release()
    assert pool.free() == SLOTS


def test_token_that_comes_back_meanwhile_gets_a_berth() -> None:
    """A token that is put back while somebody looks for one is not taken without a berth."""
    pool = SlotPool.create(1)
    lease = take(pool)
    section = pool.sections[0]

    class Late(Section):
        def take(self, *, seat: bool = False) -> Optional[tuple[int, int]]:
            found = super().take(seat=seat)
            lease.release()
            return found

    pool.sections = [Late(section.pipe, section.berths, 0)]
    lease.section = pool.sections[0]
    other = take(pool)
    assert other.fileno() >= 0
    other.release()
    pool.close()


def test_crowd_at_one_slot() -> None:
    """However many try at once, whoever gets a token gets a berth for it: there are enough."""
    pool = SlotPool.create(1)

    def work() -> None:
        for _ in range(400):
            lease = pool.try_take()
            if lease is not None:
                assert lease.fileno() >= 0
                lease = lent(lease)
                lease.release()

    workers = [in_child(work) for _ in range(24)]
    assert [reap(pid) for pid in workers] == [0] * 24
    assert pool.free() == 1
    pool.close()


def test_sweep_leaves_the_living(pool: SlotPool) -> None:
    """Sweeping takes nothing from who holds a lease."""
    lease = take(pool)
    assert pool.sweep() == 0
    assert pool.free() == SLOTS - 1
    lease.release()


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.sampled_from("trlsd"), st.integers(0, 7)), max_size=40))
def test_any_order_of_operations(operations: list[tuple[str, int]]) -> None:
    """Free tokens and leases are always as many as there are slots."""
    pool = SlotPool.create(SLOTS)
    held: list[Lease] = []
    for operation, number in operations:
        if operation == "t":
            lease = pool.try_take()
            assert (lease is None) == (len(held) == SLOTS)
            held += [lease] if lease else []
        elif operation == "s":
            assert pool.sweep() == 0
        elif held:
            lease = held.pop(number % len(held))
            if operation == "r":
                lease.release()
            elif operation == "l":
                held.append(lent(lease))
            else:
                lease.abandon()  # nobody shares it: a dead holder's
                assert pool.sweep() == 1
        assert pool.free() + len(held) == SLOTS
    for lease in held:
        lease.release()
    pool.close()


def test_tokens_go_back_to_their_section() -> None:
    """A pool of more tokens than one pipe may hold gets each back where it came from."""
    pool = SlotPool.create(300)
    before = [pool_bytes(pool, number) for number in range(len(pool.sections))]
    leases = [take(pool) for _ in range(300)]
    assert pool.try_take() is None
    random.Random(1).shuffle(leases)
    for lease in leases:
        lease.release()

    assert len(before) > 1
    assert [pool_bytes(pool, number) for number in range(len(pool.sections))] == before
    assert pool.free() == 300
    pool.close()


def pool_bytes(pool: SlotPool, number: int) -> int:
    from jobserver._slots._splice import waiting_bytes

    return waiting_bytes(pool.sections[number].pipe)


# SIGKILL after each step


def _take_and_release(pool: SlotPool) -> None:
    take(pool).release()


def _take_and_lend(pool: SlotPool) -> None:
    lent(take(pool)).release()


def _lend_twice_and_abandon(pool: SlotPool) -> None:
    first = take(pool)
    second = lent(first)
    lent(second).abandon()
    pool.sweep()


def _sweep(pool: SlotPool) -> None:
    take(pool).abandon()
    pool.sweep()


def _reclaim(pool: SlotPool) -> None:
    lease = take(pool)
    if lease.reclaim():
        lease.release()


def _lend_where_it_lies(pool: SlotPool) -> None:
    section = pool.sections[0]
    lease = take(pool)
    moved = section.relock(lease.fileno(), lease.berth)
    assert moved is not None
    lease.abandon()
    Lease(pool, *moved, section).release()


def _take_all(pool: SlotPool) -> None:
    leases = [take(pool) for _ in range(SLOTS)]
    for lease in leases:
        lease.release()


SCENARIOS = [
    _take_and_release,
    _take_and_lend,
    _lend_twice_and_abandon,
    _lend_where_it_lies,
    _sweep,
    _reclaim,
]


def kill_everywhere(pool: SlotPool, action: Callable[[SlotPool], None], what: str) -> int:
    """Kill a process at each step of an action; after each kill all tokens are back."""
    step = 0
    while True:
        step += 1
        status = reap(in_child(lambda step=step: die_at(step, what, lambda: action(pool))))  # type: ignore[misc]
        pool.sweep()
        assert pool.free() == SLOTS, f"step {step} of {action.__name__}"
        assert pool.sweep() == 0
        if status == 0:
            return step
        assert status == -signal.SIGKILL


@pytest.mark.contract("S18")
@pytest.mark.parametrize("action", SCENARIOS)
def test_kill_at_each_line(pool: SlotPool, action: Callable[[SlotPool], None]) -> None:
    """SIGKILL before any line of taking, lending, sweeping and returning loses no token."""
    assert kill_everywhere(pool, action, "line") > 15


@pytest.mark.slow
@pytest.mark.parametrize("action", [*SCENARIOS, _take_all])
def test_kill_at_each_instruction(pool: SlotPool, action: Callable[[SlotPool], None]) -> None:
    """The same before each instruction of the interpreter."""
    assert kill_everywhere(pool, action, "opcode") > 150


@pytest.mark.contract("S18", "F26")
def test_orphan_keeps_its_slot(pool: SlotPool) -> None:
    """While a worker lives its slot is taken, though its submitter is dead; then it is swept."""
    reader, writer = os.pipe()

    def submitter() -> None:
        lease = take(pool)
        worker = worker_on(lease)
        os.write(writer, b"%d" % worker)
        signal.pause()

    pid = in_child(submitter)
    worker = int(os.read(reader, 20))
    kill(pid)

    assert pool.sweep() == 0
    assert pool.free() == SLOTS - 1

    os.kill(worker, signal.SIGKILL)
    wait_until(pool.sweep, "the orphan's token")
    assert pool.free() == SLOTS
    os.close(reader)
    os.close(writer)


def test_all_descriptors_closed() -> None:
    """A program that has closed all its descriptors can make a new pool, and use it."""

    def use() -> None:
        pool = SlotPool.create(1)
        take(pool).release()
        assert pool.free() == 1

    def work() -> None:
        use()
        os.closerange(3, 256)
        use()
        os.closerange(3, 256)
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(64)]
        use()
        assert len({os.fstat(file).st_ino for file in files}) == 1

    assert reap(in_child(work)) == 0


@pytest.mark.contract("S18")
def test_sibling_does_not_keep_a_dead_ones_slot(pool: SlotPool) -> None:
    """A worker has no part in the lock of its sibling's slot."""
    lease = take(pool)
    other = take(pool)
    worker = worker_on(other)
    lease.abandon()  # as if its worker and its submitter were gone

    assert pool.sweep() == 1
    assert pool.free() == SLOTS - 1

    other.abandon()
    assert pool.sweep() == 0
    kill(worker)
    assert pool.sweep() == 1
    assert pool.free() == SLOTS


def test_concurrent_sweepers(pool: SlotPool) -> None:
    """Any number of processes may sweep at once: each token goes back once."""
    leases: list[Lease] = []

    def hold() -> None:
        leases.extend(take(pool) for _ in range(SLOTS))
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(5):
        assert reap(in_child(hold)) == -signal.SIGKILL
        sweepers = [in_child(pool.sweep) for _ in range(4)]
        assert [reap(pid) for pid in sweepers] == [0] * 4
        assert pool.free() == SLOTS


# Many processes


@pytest.mark.contract("N5", "S18")
def test_census_under_random_kills(pool: SlotPool) -> None:
    """Processes that take, lend and return, and are killed at random, never hold too much."""
    _chaos(pool, kills=60, clients=4, seed=7)


@pytest.mark.slow
def test_census_under_very_many_kills(pool: SlotPool) -> None:
    """The same for longer, and in another order each time."""
    _chaos(pool, kills=3000, clients=8, seed=time.time_ns())


def _chaos(pool: SlotPool, kills: int, clients: int, seed: int) -> None:
    chance = random.Random(seed)
    # One byte for each client, which is 1 for as long as it holds a slot for certain.
    held = mmap.mmap(-1, clients)
    pids = [_client(pool, held, number) for number in range(clients)]
    try:
        for count in range(kills):
            time.sleep(chance.random() * 0.004)
            number = chance.randrange(clients)
            kill(pids[number])
            held[number] = 0
            pids[number] = _client(pool, held, number)
            if count % 10 == 0:
                assert _census(pids, held) <= SLOTS, f"seed {seed}"
    finally:
        for pid in pids:
            kill(pid)
        held.close()
    pool.sweep()
    assert pool.free() == SLOTS, f"seed {seed}"


def _client(pool: SlotPool, held: mmap.mmap, number: int) -> int:
    def work() -> None:
        while True:
            lease = pool.try_take()
            if lease is None:
                pool.sweep()
                continue
            held[number] = 1
            lease = lent(lease)
            held[number] = 0
            lease.release()

    return in_child(work)


def _census(pids: list[int], held: mmap.mmap) -> int:
    """Stop everybody, then count."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        wait_until(lambda pid=pid: process_state(pid) == "T")  # type: ignore[misc]
    count = sum(held[:])
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return count
