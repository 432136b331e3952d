# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""With-blocks, closing, and Jobservers that are finalized."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
from typing import Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    add,
    await_answer,
    fail,
    identity,
    nothing,
    run_program,
    wait_until,
)
from jobs import close_in_job

from jobserver import Jobserver

# with-blocks and closing


@pytest.mark.contract("H3")
def test_with_gives_the_handle() -> None:
    """with js as name: name is the handle."""
    js = Jobserver("fork", 1)
    with js as entered:
        assert entered is js


@pytest.mark.contract("H3", "F13")
def test_exit_reaps_and_calls_back() -> None:
    """Leaving the block reaps what has finished and issues its callbacks."""
    seen: list[str] = []
    with Jobserver("fork", 1) as js:
        future = js.submit(nothing)
        future.when_done(seen.append, "called")
        await_answer(future)

    assert seen == ["called"]


@pytest.mark.contract("H3", "F20")
def test_exit_warns_of_each_callback_error(gate: Gate) -> None:
    """Each callback error that nobody has seen becomes a RuntimeWarning on leaving."""
    js = Jobserver("fork", 2)
    futures = [js.submit(gate.enter) for _ in range(2)]
    for future in futures:
        future.when_done(fail, LookupError, "nobody looked")
    gate.open()
    for future in futures:
        await_answer(future)

    with pytest.warns(RuntimeWarning) as warned, js:
        pass

    assert [w.category for w in warned] == [RuntimeWarning] * 2
    assert all("nobody looked" in str(w.message) for w in warned)


@pytest.mark.contract("H3", "H11")
def test_exit_of_an_inner_block() -> None:
    """Leaving a block that is not the last one reaps and calls back as well, and closes nothing."""
    seen: list[str] = []
    with Jobserver("fork", 1) as js:
        with js.replace(env=()) as sibling:
            future = sibling.submit(nothing)
            future.when_done(int, "no number")
            future.when_done(seen.append, "called")
            await_answer(future)
            with pytest.warns(RuntimeWarning, match="no number"):
                sibling.__exit__(None, None, None)
            assert seen == ["called"]
            sibling.__enter__()
        assert sibling.submit(nothing, timeout=0).wait(PATIENCE)


@pytest.mark.contract("H3", "H4", "F22")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, LookupError])
def test_exit_closes_whatever_callbacks_raise(kind: type[BaseException]) -> None:
    """What a callback, or a warning that is an error, raises on leaving does not keep it open."""
    js = Jobserver("fork", 1)
    seen: list[str] = []
    js.__enter__()
    future = js.submit(identity, args=(1,))
    future.when_done(fail, kind)
    future.when_done(seen.append, "called")
    await_answer(future)

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else RuntimeWarning):
            js.__exit__(None, None, None)

    with pytest.raises(RuntimeError, match="Jobserver is closed"):
        js.submit(nothing)
    assert future.result(PATIENCE) == 1
    assert seen == ["called"]


@pytest.mark.contract("H3")
def test_exit_keeps_the_blocks_own_exception() -> None:
    """An exception inside the block is what comes out of it."""
    js = Jobserver("fork", 1)
    future = js.submit(nothing)
    future.when_done(int, "no number")
    await_answer(future)

    with pytest.warns(RuntimeWarning), pytest.raises(ZeroDivisionError), js:
        raise ZeroDivisionError


@pytest.mark.contract("H3", "H4", "F6")
def test_exit_does_not_wait(method: str, gate: Gate) -> None:
    """Leaving the block waits for no running job; its Future still completes afterwards."""
    with Jobserver(method, 2) as js:
        futures = [js.submit(gate.enter), js.submit(gate.enter)]
        gate.await_entered(2)
    assert not futures[0].done()
    gate.open()

    assert {future.result(PATIENCE) for future in futures} == set(gate.entered())


@pytest.mark.contract("H4")
@pytest.mark.parametrize(
    "work",
    [
        lambda js: js.submit(nothing),
        lambda js: js.submit(nothing, timeout=0),
        lambda js: js.submit(nothing, consume=0),
        lambda js: js(nothing),
        lambda js: list(js.map(identity, [(1,)])),
    ],
    ids=["submit", "timeout=0", "consume=0", "call", "map"],
)
def test_closed_refuses_work(work: Callable[[Jobserver], object]) -> None:
    """A closed Jobserver refuses work with RuntimeError."""
    with Jobserver("fork", 1) as js:
        js.submit(nothing).wait(PATIENCE)

    with pytest.raises(RuntimeError, match="Jobserver is closed"):
        work(js)


@pytest.mark.contract("H4")
def test_closed_for_all_handles() -> None:
    """Siblings and copies of a closed Jobserver refuse work, too."""
    js = Jobserver("fork", 1)
    handles = [js.replace(env=()), copy.copy(js), copy.deepcopy(js)]
    with js:
        pass

    for handle in handles:
        with pytest.raises(RuntimeError, match="Jobserver is closed"):
            handle.submit(nothing)


@pytest.mark.contract("H4", "S3")
def test_closing_wakes_a_waiting_submit(gate: Gate) -> None:
    """A submit that waits for a slot while its pool is closed does not wait for ever."""
    js = Jobserver("fork", 1)
    outcome: list[object] = []

    def waiting() -> None:
        try:
            outcome.append(js.submit(nothing).wait(PATIENCE))
        except RuntimeError as error:
            outcome.append(error)

    with js:
        running = js.submit(gate.enter)
        gate.await_entered(1)
        thread = threading.Thread(target=waiting)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
    gate.open()
    running.wait(PATIENCE)
    thread.join(PATIENCE)

    assert not thread.is_alive()
    assert [type(ended) for ended in outcome] == [RuntimeError]


@pytest.mark.contract("H11")
@pytest.mark.parametrize(
    "sibling", [lambda js: js.replace(env=()), copy.copy, copy.deepcopy, lambda js: js]
)
def test_last_block_closes(sibling: Callable[[Jobserver], Jobserver]) -> None:
    """With blocks open on several handles, or twice on one, the last one left closes."""
    js = Jobserver("fork", 1)
    other = sibling(js)
    with js:
        with other:
            assert other.submit(identity, args=(1,)).result(PATIENCE) == 1
        assert other.submit(identity, args=(2,)).result(PATIENCE) == 2
        assert js.submit(identity, args=(3,)).result(PATIENCE) == 3

    for handle in (js, other):
        with pytest.raises(RuntimeError):
            handle.submit(nothing)


@pytest.mark.contract("H11")
def test_blocks_may_be_left_in_any_order() -> None:
    """Which handle's block is left first does not matter."""
    js = Jobserver("fork", 1)
    other = js.replace(env=())
    js.__enter__()
    other.__enter__()
    js.__exit__(None, None, None)
    assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
    other.__exit__(None, None, None)

    with pytest.raises(RuntimeError):
        js.submit(nothing)


@pytest.mark.contract("H11", "H6", "H4")
def test_block_in_a_job_closes_nothing_outside(method: str) -> None:
    """A with-block that a job opens on its handle closes the job's handle, not the caller's."""
    with Jobserver(method, 2) as js:
        assert js.submit(close_in_job, args=(js,)).result(PATIENCE) == [1, "RuntimeError"]
        assert js.submit(identity, args=(2,)).result(PATIENCE) == 2


# finalizing


@pytest.mark.contract("H12")
def test_finalized_with_running_futures(method: str, gate: Gate) -> None:
    """A Jobserver that goes away while its jobs run gives a ResourceWarning; they complete."""
    js = Jobserver(method, 1)
    future = js.submit(gate.enter)
    gate.await_entered(1)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del js
        gc.collect()

    assert [w.category for w in warned] == [ResourceWarning]
    gate.open()
    assert future.result(PATIENCE) in gate.entered()


@pytest.mark.contract("H12")
def test_finalized_where_warnings_are_errors(
    method: str, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning is told as an error that cannot be raised, and nothing is left behind."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))
    js = Jobserver(method, 1)
    future = js.submit(gate.enter)
    gate.await_entered(1)

    del js
    gc.collect()

    assert told == [ResourceWarning]
    gate.open()
    assert future.result(PATIENCE) in gate.entered()


@pytest.mark.contract("H12", "F26")
def test_finalized_with_dropped_futures() -> None:
    """Also when nobody holds the Future: the warning comes, and the job ends by itself."""
    done = run_program(
        [
            "-W",
            "always",
            "-c",
            "import gc, jobserver\n"
            "from helpers import sleep\n"
            "js = jobserver.Jobserver('fork', 1)\n"
            "js.submit(sleep, args=(0.3,))\n"
            "del js\n"
            "gc.collect()\n"
            "print('went on')\n",
        ]
    )

    assert done.stdout == "went on\n"
    assert done.stderr.count("ResourceWarning: Finalizing") == 1
    assert done.returncode == 0


@pytest.mark.contract("H12")
def test_finalized_in_peace() -> None:
    """A Jobserver whose jobs have all been observed goes without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        js = Jobserver("fork", 2)
        futures = [js.submit(nothing) for _ in range(2)]
        assert all(future.wait(PATIENCE) for future in futures)
        del js, futures
        gc.collect()


@pytest.mark.contract("H13", "S18")
def test_pool_of_a_dropped_jobserver_is_freed() -> None:
    """Making and dropping many Jobservers costs no descriptors."""
    from helpers import open_fds

    before = len(open_fds())
    for _ in range(50):
        js = Jobserver("fork", 3)
        assert js.submit(add, args=(1,)).result(PATIENCE) == 1
    del js
    gc.collect()

    wait_until(lambda: len(open_fds()) == before, "the descriptors to be closed")
