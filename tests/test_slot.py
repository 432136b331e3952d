# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""js.slot(): a slot for work in this very process."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any, Callable

import pytest
from helpers import PATIENCE, Gate, add, await_end, identity, open_fds, pid, touch, wait_until
from marks import by_method

from jobserver import Blocked, CallbackRaised, Jobserver, JobserverExecutor


def free(js: Jobserver) -> int:
    """How many tokens are free."""
    return js._shared.slots.free()


def in_threads(count: int, work: Callable[[], Any]) -> list[Any]:
    """Call work in threads of their own; what they have returned or raised."""
    results: list[Any] = [None] * count

    def call(number: int) -> None:
        try:
            results[number] = work()
        except BaseException as error:
            results[number] = error

    threads = [
        threading.Thread(target=call, args=(number,), daemon=True) for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "stuck"
    return results


class Counter:
    """How many are inside at once, and the most there ever were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self.peak = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self.peak = max(self.peak, self._inside)

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1


@pytest.mark.contract("K5")
def test_slot_is_held_and_returned() -> None:
    """Inside the block one slot less is free, and after it all are, also after an exception."""
    with Jobserver("fork", 2) as js:
        for error in (None, KeyError):
            try:
                with js.slot():
                    assert free(js) == 1
                    assert js.submit(add, args=(1, 2), timeout=0).result(PATIENCE) == 3
                    if error is not None:
                        raise error
            except KeyError:
                pass
            assert free(js) == 2


@pytest.mark.contract("K5")
def test_slot_in_time_or_not_at_all(gate: Gate) -> None:
    """With no slot in time the block is not entered, Blocked is raised, and nothing is taken."""
    with Jobserver("fork", 1) as js:
        busy = js(gate.enter)
        for timeout in (0, 0.05):
            with pytest.raises(Blocked), js.slot(timeout):
                pytest.fail("entered")
        gate.open()
        busy.result(PATIENCE)
        with js.slot(0):
            assert free(js) == 0
        assert free(js) == 1
        for bad in (-1, float("nan"), float("inf")):
            with pytest.raises(ValueError):
                js.slot(bad)
        with pytest.raises(TypeError):
            js.slot("1")  # type: ignore[arg-type]


@pytest.mark.contract("K5", "H4")
@pytest.mark.fresh("waits for the process to end")
def test_closed_or_failing_callback() -> None:
    """A closed Jobserver has no slots, and a callback's failure comes before anything is taken."""
    with Jobserver("fork", 1) as js:
        future = js(identity, 1)
        future.when_done(touch)
        await_end_of(js, future)
        with pytest.raises(CallbackRaised), js.slot():
            pytest.fail("entered")
        with js.slot():
            assert free(js) == 0
        block = js.slot()
    with pytest.raises(RuntimeError), block:
        pytest.fail("entered")


def await_end_of(js: Jobserver, future: Any) -> None:
    """Wait until a job has ended, without observing it."""
    from helpers import worker_pid

    await_end(worker_pid(future))


@pytest.mark.contract("K5", "N5")
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_threads_never_exceed_the_slots(slots: int) -> None:
    """As many threads are inside their blocks as there are slots, never more, and all get in."""
    counter, barrier = Counter(), threading.Barrier(slots)
    with Jobserver("fork", slots) as js:

        def work() -> None:
            for number in range(4):
                with js.slot(), counter:
                    if number == 0:
                        barrier.wait(PATIENCE)

        assert in_threads(2 * slots, work) == [None] * 2 * slots
        assert counter.peak == slots
        assert free(js) == slots


@pytest.mark.contract("K5", "N3", "N4")
@by_method("slots, lend", [(1, False), (1, True), (2, False), (2, True)])
def test_holder_lends_in_submit(method: str, slots: int, lend: bool) -> None:
    """A thread that holds the only slots lends one to the job that it submits."""
    with Jobserver(method, slots, lend=lend) as js:
        with js.slot():
            assert js(tree, js, 1).result() == 3
            assert free(js) == slots - 1
        assert free(js) == slots


def tree(js: Jobserver, depth: int) -> int:
    """A job: count a tree of jobs, with a slot held where there is one already."""
    if depth == 0:
        return 1
    with js.slot():
        return 1 + sum(child.result() for child in [js(tree, js, depth - 1) for _ in range(2)])


@pytest.mark.contract("K5", "N3", "N5")
@pytest.mark.parametrize("lend", [False, True])
@pytest.mark.parametrize("slots", [1, 2])
def test_many_holders_that_submit(slots: int, lend: bool) -> None:
    """Threads that hold slots and submit trees of jobs neither deadlock nor exceed the slots."""
    counter = Counter()
    with Jobserver("fork", slots, lend=lend) as js:

        def work() -> int:
            with js.slot():
                with counter:
                    time.sleep(0.001)
                result = js(tree, js, 1).result()
                with counter:
                    time.sleep(0.001)
                return result

        assert in_threads(4, work) == [3] * 4
        assert counter.peak <= slots
        assert free(js) == slots


@pytest.mark.contract("K5", "N6")
def test_lend_while_waiting(gate: Gate) -> None:
    """With lend=True the slot is free for others while its holder waits, and only then."""
    with Jobserver("fork", 2, lend=True) as js:

        def work() -> int:
            with js.slot():
                future = js(gate.enter)
                return future.result() and free(js)

        results: list[int] = []
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
        gate.await_entered(1)
        wait_until(lambda: free(js) == 1)
        gate.open()
        thread.join(PATIENCE)
        assert results == [1]


@pytest.mark.contract("K5")
def test_block_in_a_block(gate: Gate) -> None:
    """A thread that holds a slot of a pool takes no second one of it; of another pool it does."""
    with Jobserver("fork", 1) as js, Jobserver("fork", 1) as other:
        block = js.slot()
        with block, js.slot(0), block, other.slot(0):
            assert (free(js), free(other)) == (0, 0)
        assert (free(js), free(other)) == (1, 1)


def hold_in_job(js: Jobserver) -> tuple[int, int]:
    """A job: free tokens without and with a slot held."""
    outside = free(js)
    with js.slot(0):
        return outside, free(js)


@pytest.mark.contract("K5", "N1")
@pytest.mark.parametrize("tasks", [1, None])
def test_a_job_uses_its_own_slot(method: str, tasks: int | None) -> None:
    """In a job the slot is the job's own."""
    with Jobserver(method, 1, max_tasks_per_child=tasks) as js:
        for _ in range(2):
            assert js(hold_in_job, js).result(PATIENCE) == (0, 0)
        assert free(js) == 1


def threads_in_job(js: Jobserver, count: int) -> int:
    """A job: how many of its threads are inside at once."""
    counter = Counter()

    def work() -> None:
        for _ in range(3):
            with js.slot(), counter:
                time.sleep(0.001)

    assert in_threads(count, work) == [None] * count
    return counter.peak


@pytest.mark.contract("K5", "N5")
@pytest.mark.parametrize("slots", [1, 2])
def test_threads_of_a_job(slots: int) -> None:
    """A job's threads share its own slot and what is free besides."""
    with Jobserver("fork", slots) as js:
        assert js(threads_in_job, js, 3).result(PATIENCE) <= slots
        assert free(js) == slots


def submit_beside_holder(js: Jobserver, gate: Gate) -> int:
    """A job: one thread uses the slot, the other submits a job that must wait for that."""
    inside = threading.Event()
    done: list[int] = []

    def work() -> None:
        with js.slot():
            inside.set()
            gate.enter()
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(PATIENCE)
    result = js(identity, 5).result()
    thread.join()
    return int(result) + len(done)


@pytest.mark.contract("K5", "N3", "N5")
def test_slot_in_use_is_not_lent_by_another_thread(gate: Gate) -> None:
    """While one thread of a job uses its only slot, another one's submission waits for it."""
    with Jobserver("fork", 1) as js:
        future = js(submit_beside_holder, js, gate)
        gate.await_entered(1)
        assert not future.wait(0.1)
        gate.open()

        assert future.result(PATIENCE) == 6


def wait_for_slotless(js: Jobserver) -> int:
    """A job: wait for one that came without a slot and wants one."""
    return js.submit(hold_and_add, args=(js,), consume=0).result()


def hold_and_add(js: Jobserver) -> int:
    """A job without a slot: take one."""
    with js.slot():
        return add(1, 2)


@pytest.mark.contract("K5", "N3")
def test_holder_without_a_slot_rings(method: str) -> None:
    """A job without a slot that wants one gets that of the job that waits for it."""
    with Jobserver(method, 1) as js:
        assert js(wait_for_slotless, js).result(PATIENCE) == 3


@pytest.mark.contract("K5")
def test_main_program_hears_the_bell() -> None:
    """Who holds a slot and waits for a job that starves lends to it."""
    with Jobserver("fork", 1) as js, js.slot():
        assert js.submit(hold_and_add, args=(js,), consume=0).result() == 3
        assert free(js) == 0


@pytest.mark.contract("K5")
def test_killed_holder(gate: Gate) -> None:
    """The slot of a holder that is killed comes back to who waits for it."""
    with Jobserver("fork", 1) as js:
        child = os.fork()
        if child == 0:
            with js.slot():
                gate.enter()
            os._exit(0)
        gate.await_entered(1)
        assert free(js) == 0
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

        assert js.submit(identity, args=(4,), timeout=PATIENCE).result(PATIENCE) == 4


@pytest.mark.contract("K5")
def test_fork_inside_the_block() -> None:
    """A child forked inside the block holds nothing: the slot stays its parent's."""
    with Jobserver("fork", 2) as js:
        with js.slot():
            js(identity, 1).result(PATIENCE)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    with js.slot(0):
                        status = free(js)
                finally:
                    os._exit(status)
            assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
            assert free(js) == 1
        assert free(js) == 2


def leave_in_child(js: Jobserver) -> int:
    """A job: a forked child leaves the block that its parent has entered."""
    with js.slot():
        child = os.fork()
    if child == 0:
        os._exit(0)
    return os.WEXITSTATUS(os.waitpid(child, 0)[1])


@pytest.mark.contract("K5")
def test_leaving_in_a_forked_child() -> None:
    """A child that leaves the block returns nothing of its parent's."""
    with Jobserver("fork", 2) as js:
        assert js(leave_in_child, js).result(PATIENCE) == 0
        assert leave_in_child(js) == 0
        assert free(js) == 2


@pytest.mark.contract("K5", "E3")
def test_executor_inside_the_block() -> None:
    """Waiting for an executor on the same slots lends as well."""
    with Jobserver("fork", 1) as js, JobserverExecutor(js) as executor:
        with js.slot():
            assert executor.submit(pid).result() != os.getpid()
            assert free(js) == 0
        assert js(executor_in_block, js).result(PATIENCE) == 3
    with Jobserver("fork", 1) as js:
        assert free(js) == 1


def executor_in_block(js: Jobserver) -> int:
    """A job: wait for an executor with the slot in use."""
    with js.slot(), JobserverExecutor(js) as executor:
        return executor.submit(add, 1, 2).result()


@pytest.mark.contract("K5")
def test_interrupted_wait(gate: Gate) -> None:
    """Ctrl-C while waiting for a slot takes none."""
    with Jobserver("fork", 1) as js:
        busy = js(gate.enter)
        gate.await_entered(1)
        timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt), js.slot():
            pytest.fail("entered")
        timer.join()
        gate.open()
        busy.result(PATIENCE)
        assert free(js) == 1


@pytest.mark.contract("K5", "H4")
def test_closing_while_held() -> None:
    """A block may be left after its Jobserver was closed; then everything is let go."""
    before = len(open_fds())
    js = Jobserver("fork", 1)
    with js.slot():
        with js:
            pass
        with pytest.raises(RuntimeError):
            js(identity, 1)
    assert len(open_fds()) == before
