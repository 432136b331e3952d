# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The end of an executor: by shutdown, from anywhere; by signals; by being dropped; with Python."""

from __future__ import annotations

import concurrent.futures
import gc
import signal
import threading
import weakref
from concurrent.futures import CancelledError
from concurrent.futures import Future as StdFuture
from pathlib import Path
from typing import Any

import pytest
from executor_jobs import await_running, executor_threads, hold, in_threads, note_and_return
from helpers import (
    METHODS,
    PATIENCE,
    Gate,
    await_end,
    identity,
    lines,
    run_program,
    sleep,
    wait_until,
)
from jobs_ending import ignoring_signals

from jobserver import Jobserver, JobserverExecutor, SubmissionDied

swift = pytest.mark.parametrize("method", ["fork", "forkserver"])


def ended(executor: JobserverExecutor) -> bool:
    """Whether nothing is left to do."""
    return "pending=0, running=0" in repr(executor) and not executor_threads()


@pytest.mark.contract("E5")
def test_with_block_finishes_everything(method: str, tmp_path: Path) -> None:
    """Leaving a with-block waits for all calls, and then for all workers to be gone."""
    log = tmp_path / "log"
    with JobserverExecutor(2, method) as executor:
        futures = [executor.submit(note_and_return, str(log), number) for number in range(4)]
    assert all(future.done() for future in futures)
    assert sorted(lines(log)) == ["0", "1", "2", "3"]
    assert ended(executor)


@pytest.mark.contract("E5")
@pytest.mark.parametrize("wait", [True, False])
def test_no_work_after_shutdown(wait: bool) -> None:
    """submit and map raise RuntimeError after shutdown, used before or not."""
    for used in (True, False):
        executor = JobserverExecutor(1, "fork")
        if used:
            executor.submit(identity, 1)
        executor.shutdown(wait=wait)
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(identity, 1)
        executor.shutdown()


@pytest.mark.contract("E5")
@swift
def test_shutdown_without_waiting(method: str, gate: Gate) -> None:
    """shutdown(wait=False) returns at once, and everything submitted is done all the same."""
    executor = JobserverExecutor(1, method)
    futures = [executor.submit(hold, gate, number) for number in range(3)]
    gate.await_entered(1)
    executor.shutdown(wait=False)

    assert not futures[0].done()
    gate.open()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]
    wait_until(lambda: ended(executor), "the thread to end")


@pytest.mark.contract("E5", "E8")
@swift
@pytest.mark.parametrize("wait", [True, False])
def test_cancelling_shutdown(method: str, wait: bool, gate: Gate) -> None:
    """shutdown(cancel_futures=True) cancels what is pending, and lets the others end."""
    executor = JobserverExecutor(1, method)
    futures = [executor.submit(hold, gate, number) for number in range(4)]
    gate.await_entered(1)
    if wait:
        timer = threading.Timer(0.1, gate.open)
        timer.start()
        executor.shutdown(wait=True, cancel_futures=True)
        timer.join()
    else:
        executor.shutdown(wait=False, cancel_futures=True)
        assert not futures[0].done()
        gate.open()

    assert [future.cancelled() for future in futures] == [False, True, True, True]
    assert futures[0].result(PATIENCE) == 0
    executor.shutdown()
    assert len(gate.entered()) == 1


@pytest.mark.contract("E5")
def test_cancelling_shutdown_spares_what_could_run() -> None:
    """What a slot was free for is not cancelled, though the thread has not come to start it yet."""
    for _ in range(20):
        executor = JobserverExecutor(2, "fork")
        futures = [executor.submit(identity, number) for number in range(6)]
        executor.shutdown(cancel_futures=True)
        assert futures[0].result(0) == 0
        assert all(future.done() for future in futures)


@pytest.mark.contract("E5")
@pytest.mark.parametrize(
    "order",
    [
        [(True, False), (True, False)],
        [(False, False), (True, False)],
        [(True, True), (False, False)],
        [(False, True), (True, True)],
        [(False, False), (False, True), (True, False)],
    ],
)
def test_shutdown_again(order: list[tuple[bool, bool]]) -> None:
    """shutdown may be called again, in any order; cancelling later cancels what is pending then."""
    with Jobserver("fork", 1) as js:
        executor = JobserverExecutor(js)
        futures = [executor.submit(sleep, 0.02) for _ in range(3)]
        for wait, cancel in order:
            executor.shutdown(wait, cancel_futures=cancel)
        assert all(future.done() for future in futures)
        if not any(cancel for _, cancel in order):
            assert [future.result(0) for future in futures] == [0.02] * 3
        assert ended(executor)


@pytest.mark.contract("E5")
@swift
def test_shutdown_from_many_threads(method: str, gate: Gate) -> None:
    """Threads may shut down at the same time; each returns when all is done."""
    executor = JobserverExecutor(1, method)
    futures = [executor.submit(hold, gate, number) for number in range(3)]
    gate.await_entered(1)
    timer = threading.Timer(0.05, gate.open)
    timer.start()

    def shut_down() -> bool:
        executor.shutdown()
        return all(future.done() for future in futures)

    assert in_threads(*[shut_down] * 4) == [True] * 4
    timer.join()


@pytest.mark.contract("E5")
def test_shutdown_against_submit() -> None:
    """A call that is submitted while another thread shuts down is either refused or done."""
    for _ in range(20):
        executor = JobserverExecutor(2, "fork")
        accepted: list[StdFuture[int]] = []

        def submit(
            executor: JobserverExecutor = executor, accepted: list[StdFuture[int]] = accepted
        ) -> None:
            try:
                while True:
                    accepted.append(executor.submit(identity, len(accepted)))
            except RuntimeError:
                pass

        def stop(executor: JobserverExecutor = executor) -> None:
            executor.shutdown(wait=True, cancel_futures=True)

        assert in_threads(submit, stop) == [None, None]
        executor.shutdown()
        assert all(future.done() for future in accepted)


@pytest.mark.contract("E5")
@pytest.mark.parametrize("cancel", [True, False])
def test_shutdown_from_a_callback(cancel: bool, gate: Gate) -> None:
    """A callback may shut down the very executor that calls it, also with wait=True."""
    executor = JobserverExecutor(1, "fork")
    first = executor.submit(gate.enter)
    rest = [executor.submit(identity, number) for number in range(2)]
    gate.await_entered(1)
    first.add_done_callback(lambda _: executor.shutdown(wait=True, cancel_futures=cancel))
    gate.open()
    first.result(PATIENCE)
    executor.shutdown()

    assert all(future.done() for future in rest)
    assert rest[-1].cancelled() is cancel


@pytest.mark.contract("E5")
def test_shutdown_with_a_cancelled_call_only(gate: Gate) -> None:
    """shutdown does not wait for a slot when all that is pending has been cancelled."""
    with Jobserver("fork", 1) as js:
        direct = js.submit(gate.enter)
        executor = JobserverExecutor(js)
        future = executor.submit(identity, 1)
        assert future.cancel()
        executor.shutdown(wait=True)
        assert not direct.done()
        gate.open()
        direct.result(PATIENCE)


@pytest.mark.contract("E5")
def test_shutdown_without_any_call() -> None:
    """An executor that was never used ends at once, in each way, and leaves nothing."""
    JobserverExecutor(1, "fork").shutdown()
    JobserverExecutor(1, "fork").shutdown(wait=False, cancel_futures=True)
    JobserverExecutor(1, "fork").kill_workers()
    with JobserverExecutor(1, "fork"):
        pass
    with Jobserver("fork", 1) as js:
        with JobserverExecutor(js):
            pass
        assert js.submit(identity, args=(1,)).result(PATIENCE) == 1


# terminate_workers and kill_workers


@pytest.mark.contract("E5")
@pytest.mark.parametrize("how", ["terminate_workers", "kill_workers"])
def test_stop_workers(method: str, how: str, gate: Gate) -> None:
    """Running calls fail with the signal, pending ones are cancelled, nothing more is accepted."""
    executor = JobserverExecutor(2, method)
    futures = [executor.submit(gate.enter) for _ in range(4)]
    gate.await_entered(2)
    getattr(executor, how)()

    for future in futures[:2]:
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        number = signal.SIGTERM if how == "terminate_workers" else signal.SIGKILL
        assert caught.value.exitcode == -number
    for future in futures[2:]:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError):
        executor.submit(identity, 1)
    executor.shutdown()
    assert ended(executor)


@pytest.mark.contract("E5")
def test_kill_those_that_do_not_listen(gate: Gate) -> None:
    """terminate_workers does not wait for workers that ignore SIGTERM; kill_workers ends them."""
    executor = JobserverExecutor(1, "fork")
    future = executor.submit(ignoring_signals, gate)
    pid = gate.await_entered(1)[0]
    executor.terminate_workers()
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(0.1)
    executor.kill_workers()
    await_end(pid)
    with pytest.raises(SubmissionDied):
        future.result(PATIENCE)
    executor.shutdown()


@pytest.mark.contract("E5")
@swift
def test_kill_spares_nobody(method: str) -> None:
    """A worker that is just being started when kill_workers is called does not survive it."""
    for _ in range(10):
        executor = JobserverExecutor(2, method)
        futures = [executor.submit(sleep, 60) for _ in range(3)]
        executor.kill_workers()
        executor.shutdown()
        assert all(future.done() for future in futures)


@pytest.mark.contract("E3", "E5")
def test_kill_touches_only_its_own(gate: Gate) -> None:
    """Direct submissions on a shared Jobserver, and another executor's calls, are not signalled."""
    with Jobserver("fork", 3) as js, JobserverExecutor(js) as other:
        executor = JobserverExecutor(js)
        mine = executor.submit(sleep, 60)
        theirs = other.submit(gate.enter)
        direct = js.submit(gate.enter)
        gate.await_entered(2)
        await_running(mine)
        executor.kill_workers()
        with pytest.raises(SubmissionDied):
            mine.result(PATIENCE)
        gate.open()
        assert {theirs.result(PATIENCE), direct.result(PATIENCE)} == set(gate.entered())


# Dropped


@pytest.mark.contract("E5")
@swift
def test_dropped_executor_finishes(method: str, gate: Gate) -> None:
    """An executor without a reference is collected at once; its calls are done, its thread ends."""
    executor = JobserverExecutor(1, method)
    watched = weakref.ref(executor)
    futures = [executor.submit(hold, gate, number) for number in range(3)]
    gate.await_entered(1)
    del executor

    assert watched() is None
    gate.open()
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 2]
    wait_until(lambda: not executor_threads(), "the thread to end")


@pytest.mark.contract("E5")
def test_dropped_unused() -> None:
    """An executor that was never used can be dropped."""
    JobserverExecutor(1, "fork")
    assert executor_threads() == []


@pytest.mark.contract("E5")
@pytest.mark.parametrize("held", ["reactor", "backlog", "starting", "nothing"])
def test_collected_at_a_bad_moment(held: str) -> None:
    """The garbage collector may find an executor while the same thread holds one of our locks."""
    with Jobserver("fork", 2) as js:
        executor: Any = JobserverExecutor(js)
        iterator: Any = executor.map(sleep, [0.2] * 5)
        engine = executor._engine
        locks: dict[str, Any] = {
            "reactor": js._shared.reactor.lock,
            "backlog": engine._backlog.lock,
            "starting": engine._starting,
            "nothing": threading.Lock(),
        }
        assert next(iterator) == 0.2
        cycle: dict[str, Any] = {"executor": executor, "iterator": iterator}
        cycle["cycle"] = cycle
        del executor, iterator, cycle
        with locks[held]:
            gc.collect()
        engine.join()
        assert engine.counts() == (0, 0)


# With the interpreter


def program(method: str, body: str) -> str:
    """A program that uses an executor and ends as it does."""
    return (
        "import atexit, sys, time\n"
        "from jobserver import Jobserver, JobserverExecutor\n"
        "from helpers import append, identity, nothing, sleep\n"
        "from executor_jobs import note_and_return\n"
        f"METHOD = {method!r}\n"
        "LOG = sys.argv[1]\n"
        "if __name__ == '__main__':\n"
        + "".join(f"    {line}\n" for line in body.strip().splitlines())
    )


def run_to_end(tmp_path: Path, method: str, body: str) -> tuple[list[str], str, int]:
    """Run a program; what its jobs have noted, its standard error and its exit status."""
    path = tmp_path / "program.py"
    path.write_text(program(method, body))
    log = tmp_path / "log"
    done = run_program([str(path), str(log)])
    return sorted(lines(log)), done.stderr, done.returncode


ENDINGS = {
    "shutdown without waiting": "ex.shutdown(wait=False)",
    "nothing at all": "",
    "dropped": "del ex",
    "sys.exit": "sys.exit(3)",
    "an error": "1 / 0",
}


@pytest.mark.contract("E5")
@pytest.mark.parametrize("method", METHODS)
def test_exit_finishes_what_is_pending(method: str, tmp_path: Path) -> None:
    """A program that ends with calls pending does them all first."""
    body = """
ex = JobserverExecutor(1, METHOD)
for number in range(3):
    ex.submit(note_and_return, LOG, number)
"""
    assert run_to_end(tmp_path, method, body) == (["0", "1", "2"], "", 0)


@pytest.mark.contract("E5")
@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_after(ending: str, tmp_path: Path) -> None:
    """However the main program ends, what was submitted is done."""
    body = f"""
ex = JobserverExecutor(1, METHOD)
for number in range(3):
    ex.submit(note_and_return, LOG, number)
{ENDINGS[ending]}
"""
    noted, error, status = run_to_end(tmp_path, "fork", body)
    assert noted == ["0", "1", "2"]
    assert status == {"sys.exit": 3, "an error": 1}.get(ending, 0)
    assert ("ZeroDivisionError" in error) == (ending == "an error")
    assert ending == "an error" or error == ""


@pytest.mark.contract("E5")
@pytest.mark.parametrize("used", [True, False])
def test_submit_while_the_interpreter_ends(used: bool, tmp_path: Path) -> None:
    """An exit handler that submits is refused with RuntimeError, and nothing hangs."""
    body = f"""
ex = JobserverExecutor(1, METHOD)
@atexit.register
def late():
    try:
        ex.submit(nothing)
    except RuntimeError as error:
        append(LOG, str(error))
if {used}:
    ex.submit(nothing).result()
"""
    noted, error, status = run_to_end(tmp_path, "fork", body)
    assert noted == ["cannot schedule new futures after interpreter shutdown"]
    assert (error, status) == ("", 0)


@pytest.mark.contract("E5", "E3")
def test_exit_with_a_shared_jobserver(tmp_path: Path) -> None:
    """At the end the executor waits for slots that direct submissions hold, and gets them."""
    body = """
js = Jobserver(METHOD, 1)
direct = js.submit(sleep, args=(0.2,))
one, other = JobserverExecutor(js), JobserverExecutor(js)
for number in range(2):
    one.submit(note_and_return, LOG, number)
    other.submit(note_and_return, LOG, number + 2)
js = direct = None
"""
    noted, error, status = run_to_end(tmp_path, "fork", body)
    assert (noted, status) == (["0", "1", "2", "3"], 0)
    assert "Error" not in error


@pytest.mark.contract("E5")
def test_callback_at_exit_may_not_submit(tmp_path: Path) -> None:
    """A callback that runs while the interpreter ends is told so when it submits."""
    body = """
ex = JobserverExecutor(1, METHOD)
def callback(future):
    append(LOG, "called")
    try:
        ex.submit(nothing)
    except RuntimeError as error:
        append(LOG, str(error))
ex.submit(sleep, 0.3).add_done_callback(callback)
"""
    noted, error, status = run_to_end(tmp_path, "fork", body)
    assert noted == ["called", "cannot schedule new futures after interpreter shutdown"]
    assert (error, status) == ("", 0)


@pytest.mark.contract("E5")
def test_exit_in_a_thread_that_shuts_down(tmp_path: Path) -> None:
    """A program may end while a daemon thread sits in shutdown."""
    body = """
import threading
ex = JobserverExecutor(1, METHOD)
ex.submit(sleep, 0.3)
ex.submit(note_and_return, LOG, 1)
threading.Thread(target=ex.shutdown, daemon=True).start()
"""
    assert run_to_end(tmp_path, "fork", body) == (["1"], "", 0)
