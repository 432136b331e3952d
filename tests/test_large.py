# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Large data on its way, in both directions: whole, owned, in bounded memory, whatever happens."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Callable

import pytest
from helpers import (
    PATIENCE,
    Gate,
    descendants,
    free_slots,
    has_ended,
    identity,
    run_program,
    settle,
    wait_until,
    worker_pid,
)
from jobs_large import MEGABYTE, Heavy, make, overwrite, raise_heavy, same, twice

from jobserver import Jobserver, SubmissionDied, _fds, _forking, _large

if TYPE_CHECKING:
    from pathlib import Path

#: What this Python has not by itself, it has by ctypes.
OLD = sys.version_info < (3, 10)

#: Large enough for two rounds of fetching.
TWO_ROUNDS = 40 * MEGABYTE

LAUNCHES = ["fork", "forkserver", "warm fork", "warm forkserver"]


def jobserver(launch: str) -> Jobserver:
    """One slot; with workers that stay, one that has run a job already."""
    *warm, method = launch.split()
    js = Jobserver(method, 1, max_tasks_per_child=None if warm else 1)
    if warm:
        js.submit(identity, args=(0,)).result(PATIENCE)
    return js


@pytest.mark.contract("S2", "F6")
@pytest.mark.parametrize(
    ("launch", "kind"),
    [(launch, kind) for launch in LAUNCHES for kind in ("bytes", "bytearray", "buffer", "nested")]
    + [("spawn", "nested")],
)
def test_there_and_back(launch: str, kind: str) -> None:
    """Large values arrive whole in both directions, as what they were."""
    with jobserver(launch) as js:
        for size in (MEGABYTE, 3 * MEGABYTE + 1):
            value = make(kind, size)

            assert same(js.submit(identity, args=(value,)).result(PATIENCE), value)


@pytest.mark.contract("S2", "F6")
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kind", ["numpy", "fortran", "every other", "arrow", "data frame"])
def test_libraries(launch: str, kind: str) -> None:
    """What NumPy, Arrow and pandas have arrives whole in both directions; arrays are writable."""
    library = {"arrow": "pyarrow", "data frame": "pandas"}.get(kind, "numpy")
    pytest.importorskip(library)
    value = make(kind, 4 * MEGABYTE)
    with jobserver(launch) as js:
        got = js.submit(identity, args=(value,)).result(PATIENCE)

    assert same(got, value)
    if library == "numpy":
        assert got.flags.writeable
        got[0] = 7
        assert (got[0] == 7).all()


@pytest.mark.contract("F6", "S2")
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kind", ["bytearray", "buffer"])
def test_memory_is_the_receivers_own(launch: str, kind: str) -> None:
    """What was received can be written to, and nobody else sees it; not even later jobs."""
    value = make(kind, 4 * MEGABYTE)
    first = bytes(memoryview(getattr(value, "buffer", value))[:1])
    with jobserver(launch) as js:
        got = js.submit(overwrite, args=(value,)).result(PATIENCE)

        assert same(value, make(kind, 4 * MEGABYTE))
        view = memoryview(getattr(got, "buffer", got))
        assert bytes(view[:1]) == b"!"
        view[:1] = first
        # A job that inherits it, or gets it, changes only what is its own.
        assert js.submit(overwrite, args=(got,)).result(PATIENCE) is not got
        assert same(got, value)


@pytest.mark.contract("F7")
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "buffer"])
def test_exceptions(launch: str, kind: str) -> None:
    """An exception may carry as much as a result."""
    with jobserver(launch) as js, pytest.raises(Heavy) as caught:
        js.submit(raise_heavy, args=(kind, 4 * MEGABYTE)).result(PATIENCE)

    assert same(caught.value.args[1], make(kind, 4 * MEGABYTE))
    assert "in raise_heavy" in str(caught.value.__cause__)


@pytest.mark.contract("F7", "M8")
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "buffer"])
def test_chunks(kind: str) -> None:
    """Calls that go together bring large results, and a large exception, each as what it was."""
    with Jobserver("fork", 1) as js:
        results = js.map(make, [(kind, MEGABYTE)] * 3, chunksize=3)
        assert all(same(result, make(kind, MEGABYTE)) for result in results)

        with pytest.raises(Heavy) as caught:
            list(js.map(raise_heavy, [(kind, 4 * MEGABYTE)], chunksize=2))
    assert same(caught.value.args[1], make(kind, 4 * MEGABYTE))


@pytest.mark.contract("F6")
@pytest.mark.parametrize("kind", ["bytes", "bytearray"])
def test_one_object_stays_one(kind: str) -> None:
    """What was the same object in two places is so on arrival."""
    with Jobserver("fork", 1) as js:
        one, other = js.submit(twice, args=(make(kind, MEGABYTE),)).result(PATIENCE)

    assert one is other


@pytest.mark.contract("S2", "F6")
@pytest.mark.parametrize(
    "missing",
    [
        "permission",
        "huge pages",
        pytest.param("ctypes", marks=pytest.mark.skipif(OLD, reason="needs ctypes to splice")),
    ],
)
def test_what_may_be_missing(tmp_path: Path, missing: str) -> None:
    """Where the kernel lets nobody read another's memory, or ctypes is missing, all goes well."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "if sys.argv[1] == 'ctypes':\n"
        "    sys.modules['ctypes'] = None\n"
        "from jobserver import Jobserver, _large\n"
        "from helpers import identity\n"
        "from jobs_large import MEGABYTE, make, same\n"
        "refused = []\n"
        # The zygote imports this, too, so its workers are refused likewise.
        "if sys.argv[1] == 'permission':\n"
        "    from jobserver import _native\n"
        "    _native.read_memory = lambda *args: bool(refused.append(args))\n"
        "if sys.argv[1] == 'huge pages':\n"
        "    from jobserver import _native\n"
        "    _native._madvise = lambda *args: -1\n"
        "if __name__ == '__main__':\n"
        "    for method in ('fork', 'forkserver'):\n"
        "        for tasks in (1, None):\n"
        "            with Jobserver(method, 1, max_tasks_per_child=tasks) as js:\n"
        "                for kind in ('nested', 'bytes', 'bytearray', 'buffer'):\n"
        "                    value = make(kind, 5 * MEGABYTE)\n"
        "                    assert same(js.submit(identity, args=(value,)).result(60), value)\n"
        "    print(len(refused) > 0, bool(_large._native))\n"
    )
    done = run_program([str(program), missing])

    expected = {"permission": "True True", "ctypes": "False False", "huge pages": "False True"}
    assert (done.stdout.strip(), done.stderr) == (expected[missing], "")


@pytest.mark.contract("F9", "F10", "S18")
@pytest.mark.parametrize("launch", [*LAUNCHES, "spawn"])
@pytest.mark.parametrize("size", [1, 4])
def test_killed_while_it_sends(gate: Gate, launch: str, size: int) -> None:
    """A worker that is killed while it sends has died, however soon after; its slot comes back."""
    with jobserver(launch) as js:
        future = js.submit(make, args=("bytes", size * MEGABYTE))
        await_answer(js, future)
        os.kill(worker_pid(future), signal.SIGKILL)
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)

        assert caught.value.exitcode == -signal.SIGKILL
        del caught
        assert free_slots(js, gate) == 1


def await_answer(js: Any, future: Any) -> None:
    """Wait until a worker has begun to answer, without reading any of it."""
    channel = js._shared.reactor.running[future].channel
    assert select.select([channel], [], [], PATIENCE)[0]


@pytest.mark.contract("F9", "F10", "S18")
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("fetched", [0, 1])
def test_killed_while_it_is_read(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, launch: str, fetched: int
) -> None:
    """A worker that is killed before all has been fetched has died; its slot comes back."""
    calls: list[int] = []
    fetch = _large.Loan.fetch

    def fetch_or_kill(loan: _large.Loan, most: int) -> int:
        if len(calls) == fetched:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: has_ended(pid), "the worker to be dead")
        calls.append(fetch(loan, most))
        return calls[-1]

    with jobserver(launch) as js:
        future = js.submit(make, args=("bytes", TWO_ROUNDS))
        await_answer(js, future)
        pid = worker_pid(future)
        monkeypatch.setattr(_large.Loan, "fetch", fetch_or_kill)
        with pytest.raises(SubmissionDied) as caught:
            future.result(PATIENCE)
        monkeypatch.undo()

        assert caught.value.exitcode == -signal.SIGKILL
        assert [count > 0 for count in calls] == [True] * fetched + [False]
        del caught
        assert free_slots(js, gate) == 1


def hold(value: bytes, gate: Gate) -> None:
    """Take something large, and never return."""
    gate.enter()


@pytest.mark.contract("F9", "S18")
@pytest.mark.parametrize("launch", ["forkserver", "warm fork", "warm forkserver"])
def test_killed_while_it_receives(
    make_gate: Callable[[], Gate], monkeypatch: pytest.MonkeyPatch, launch: str
) -> None:
    """A worker that is killed while it takes its arguments has died; its slot comes back."""
    killed: list[int] = []
    send_all = _fds.send_all

    def kill_and_send(sock: Any, pieces: Any) -> None:
        if sum(map(len, pieces)) >= MEGABYTE:  # the head is out, and this goes aside
            killed.extend([stays] if stays else set(descendants()) - before)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        send_all(sock, pieces)

    with jobserver(launch) as js:
        stays = js.submit(os.getpid).result(PATIENCE) if "warm" in launch else 0
        settle(js)
        before = set(descendants())
        monkeypatch.setattr(_fds, "send_all", kill_and_send)
        future = js.submit(hold, args=(bytes(TWO_ROUNDS), make_gate()))
        monkeypatch.undo()
        with pytest.raises(SubmissionDied):
            future.result(PATIENCE)

        assert len(killed) == 1
        assert free_slots(js, make_gate()) == 1


@pytest.mark.contract("F12")
@pytest.mark.parametrize("launch", LAUNCHES)
def test_interrupted_while_it_is_read(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    """Ctrl-C while a result is fetched loses nothing of it."""
    fetch = _large.Loan.fetch

    def fetch_interrupted(loan: _large.Loan, most: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return fetch(loan, most)

    with jobserver(launch) as js:
        future = js.submit(make, args=("bytes", TWO_ROUNDS))
        monkeypatch.setattr(_large.Loan, "fetch", fetch_interrupted)
        with pytest.raises(KeyboardInterrupt):
            future.result(PATIENCE)
        monkeypatch.undo()

        assert future.result(PATIENCE) == make("bytes", TWO_ROUNDS)


@pytest.mark.contract("S18")
@pytest.mark.parametrize("launch", ["forkserver", "warm fork", "warm forkserver"])
def test_interrupted_while_it_is_sent(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, launch: str
) -> None:
    """Ctrl-C while arguments are sent starts nothing and leaves nothing behind."""
    send_all = _fds.send_all

    def interrupted(sock: Any, pieces: Any) -> None:
        if sum(map(len, pieces)) >= MEGABYTE:
            raise KeyboardInterrupt
        send_all(sock, pieces)

    with jobserver(launch) as js:
        monkeypatch.setattr(_fds, "send_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            js.submit(len, args=(bytes(4 * MEGABYTE),))
        monkeypatch.undo()

        assert free_slots(js, gate) == 1


def limited(which: int, limit: int, size: int) -> bytes:
    """Return much, under a limit of this process."""
    resource.setrlimit(which, (limit, limit))
    return bytes(size)


@pytest.mark.contract("F6")
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("which", ["RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_MEMLOCK"])
def test_limits_of_the_worker(launch: str, which: str) -> None:
    """Results need no file, no further descriptor and no locked memory in the worker."""
    limit = 0 if which != "RLIMIT_NOFILE" else 3
    with jobserver(launch) as js:
        future = js.submit(limited, args=(getattr(resource, which), limit, 20 * MEGABYTE))

        assert len(future.result(PATIENCE)) == 20 * MEGABYTE


@pytest.mark.contract("S2", "S18")
@pytest.mark.parametrize("launch", ["forkserver", "warm fork"])
def test_arguments_without_descriptors(monkeypatch: pytest.MonkeyPatch, launch: str) -> None:
    """Where no descriptor is left to lend by, arguments take the worker's channel."""

    def refuse(kind: int) -> Any:
        raise OSError(24, "Too many open files")

    with jobserver(launch) as js:
        js.submit(identity, args=(0,)).result(PATIENCE)
        value = make("nested", 9 * MEGABYTE)
        if launch.startswith("warm"):
            monkeypatch.setattr("jobserver._forking.open_sockets", refuse)
        else:
            # The first is the worker's channel.
            answers = iter([_forking.open_sockets(socket.SOCK_STREAM)])
            monkeypatch.setattr(
                "jobserver._forking.open_sockets", lambda kind: next(answers, None) or refuse(kind)
            )

        assert same(js.submit(identity, args=(value,)).result(PATIENCE), value)


@pytest.mark.contract("F6", "S2")
@pytest.mark.parametrize("direction", ["argument", "result"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_peak_memory(tmp_path: Path, method: str, direction: str) -> None:
    """Caller and worker together never have more than two and a half times the data."""
    program = tmp_path / "program.py"
    program.write_text(PEAK)
    done = run_program([str(program), method, direction])

    assert done.stderr == ""
    found = dict(line.split() for line in done.stdout.splitlines())
    assert set(found) == {"bytes", "bytearray", "buffer"}
    for kind, ratio in found.items():
        assert 1.9 < float(ratio) < 2.5, kind


PEAK = """
import sys
from pathlib import Path
from jobserver import Jobserver
from helpers import nothing
from jobs_large import Blob, peak_bytes

SIZE = 64_000_000
MAKE = {
    "bytes": lambda: b"1" * SIZE,
    "bytearray": lambda: bytearray(b"1") * SIZE,
    "buffer": lambda: Blob(bytearray(b"1") * SIZE),
}

def take(value):
    pass

def give(kind):
    return MAKE[kind]()

def way(js, kind, direction):
    if direction == "argument":
        js.submit(take, args=(MAKE[kind](),)).result()
    else:
        js.submit(give, args=(kind,)).result()

if __name__ == "__main__":
    method, direction = sys.argv[1:]
    way(Jobserver(method, 1), "bytes", direction)  # imports what there is to be imported
    for kind in MAKE:
        # The worker stays, so it can be asked afterwards what it has needed.
        with Jobserver(method, 1, max_tasks_per_child=None) as js:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_bytes() + js.submit(peak_bytes).result()
            way(js, kind, direction)
            after = peak_bytes() + js.submit(peak_bytes).result()
            print(kind, (after - before) / SIZE)
"""
