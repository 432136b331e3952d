# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Signal handlers that use Jobservers and Futures, whatever call of ours they have interrupted."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import PATIENCE, Gate, identity, nothing, process_state, run_program, wait_until

from jobserver import Jobserver, SubmissionDied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], Any]], list[Any]]]:
    """Has SIGUSR1 call something; gives the list to which the handler adds what that returns."""
    before = signal.getsignal(signal.SIGUSR1)

    def use(action: Callable[[], Any]) -> list[Any]:
        found: list[Any] = []
        signal.signal(signal.SIGUSR1, lambda signum, frame: found.append(action()))
        return found

    yield use
    signal.signal(signal.SIGUSR1, before)


def signal_me_when(condition: Callable[[], object]) -> threading.Thread:
    """Send this process SIGUSR1, from another thread, when something holds."""
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        wait_until(condition)
        signal.pthread_kill(main, signal.SIGUSR1)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def asleep() -> bool:
    """Whether the main thread of this process sleeps."""
    return process_state(os.getpid()) == "S"


@pytest.mark.contract("F5", "H13")
def test_cancel_and_wait_in_a_handler(method: str, gate: Gate, on_signal: Any) -> None:
    """A handler may kill the very job that the main thread waits for, and wait for its end."""
    with Jobserver(method, 1) as js:
        future = js.submit(gate.enter)
        found = on_signal(lambda: future.wait(PATIENCE, signal=signal.SIGKILL))
        gate.await_entered(1)
        thread = signal_me_when(asleep)
        with pytest.raises(SubmissionDied):
            future.result(PATIENCE)
        thread.join(PATIENCE)

    assert found == [True]


@pytest.mark.contract("S3", "H13")
def test_submission_in_a_handler(method: str, gate: Gate, on_signal: Any) -> None:
    """A handler may submit and wait while the main thread waits for a slot."""

    def answer() -> int:
        value: int = js.submit(identity, args=(7,), consume=0).result(PATIENCE)
        gate.open()
        return value

    found = on_signal(answer)
    with Jobserver(method, 1) as js:
        js.submit(gate.enter)
        gate.await_entered(1)
        thread = signal_me_when(asleep)
        js.submit(nothing, timeout=PATIENCE).wait(PATIENCE)
        thread.join(PATIENCE)

    assert found == [7]


@pytest.mark.contract("H13")
def test_handler_that_takes_over_the_polling(make_gate: Callable[[], Gate], on_signal: Any) -> None:
    """Who polls for all passes that on to who waits in a handler, not to whom that interrupts."""
    js = Jobserver("fork", 3)
    gates = [make_gate() for _ in range(3)]
    leaders, mains, handlers = (js.submit(gate.enter) for gate in gates)
    for gate in gates:
        gate.await_entered(1)
    leader = threading.Thread(target=leaders.result)
    leader.start()
    wait_until(lambda: js._shared.reactor._leading == leader.ident, "the thread to poll")

    def open_later() -> None:
        wait_until(lambda: len(js._shared.reactor._followers) == 2, "the handler to wait")
        gates[0].open()
        leader.join(PATIENCE)
        gates[2].open()

    opener = threading.Thread(target=open_later)
    opener.start()

    def answer() -> bool:
        ended = handlers.wait(PATIENCE)
        gates[1].open()
        return ended

    found = on_signal(answer)
    thread = signal_me_when(lambda: js._shared.reactor._followers)
    assert mains.wait(PATIENCE)
    for each in (opener, thread):
        each.join(PATIENCE)

    assert found == [True]


STORM = """
import random, signal, sys, time
from jobserver import Blocked, Jobserver
from helpers import nothing

def handle(signum, frame):
    global handled
    handled += 1
    repr(js)
    for future in futures[-2:]:
        future.done()
        repr(future)
        future.wait(0, signal=signal.SIGCONT)
        future.when_done(handler_calls.append, 1)
    try:
        js.submit(nothing, timeout=0)
    except Blocked:
        pass
    js.reclaim_resources()
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-4))

if __name__ == "__main__":
    random.seed(5)
    js = Jobserver("fork", 2)
    futures, calls, handler_calls, handled = [], [], [], 0
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 1e-3)
    for number in range(int(sys.argv[1])):
        future = js.submit(nothing)
        futures.append(future)
        future.when_done(calls.append, number)
        future.done()
        repr(future)
        future.wait()
        del futures[:-4]
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert handled > number
    print(calls == list(range(number + 1)))
"""


@pytest.mark.contract("H13", "F13")
def test_storm_of_handlers(tmp_path: Path) -> None:
    """A handler may use the very things that it has interrupted the use of, at any instant."""
    script = tmp_path / "program.py"
    script.write_text(STORM)

    done = run_program([str(script), "60"])

    assert (done.stdout, done.stderr) == ("True\n", "")
