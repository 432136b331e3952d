# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Limits of the system hit in the middle of submit: a clear error, nothing lost, work goes on."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import Gate, run_program

#: Common to all programs here: what is left after the limit is gone.
PRELUDE = """
import errno, os, resource, sys
import multiprocessing.forkserver, multiprocessing.resource_tracker
from pathlib import Path
from jobserver import Jobserver, SubmissionDied
from helpers import (
    PATIENCE, Gate, free_slots, identity, nothing, open_fds, settle, steady_fds, wait_until
)

method, directory = sys.argv[1:3]

def limit(name, soft):
    hard = resource.getrlimit(name)[1]
    resource.setrlimit(name, (soft, hard))

def back_to(js, before):
    settle(js)
    wait_until(lambda: (js.reclaim_resources(), len(open_fds()) == before)[1], "descriptors")

def check(js, before):
    back_to(js, before)
    assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
    print(free_slots(js, Gate(Path(directory))))
"""

DESCRIPTORS = (
    PRELUDE
    + """
if __name__ == "__main__":
    js = Jobserver(method, 2)
    js.submit(nothing).result(PATIENCE)
    before = steady_fds(js)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    refused = worked = 0
    for spare in range(24):
        limit(resource.RLIMIT_NOFILE, before + spare)
        try:
            future = js.submit(identity, args=(spare,), timeout=PATIENCE)
        except OSError as error:
            assert error.errno == errno.EMFILE, error
            refused += 1
        else:
            # The limit is inherited: a worker may itself fail for want of descriptors.
            try:
                worked += future.result(PATIENCE) == spare
            except (OSError, RuntimeError, SubmissionDied):
                pass
        limit(resource.RLIMIT_NOFILE, usual)
        back_to(js, before)
    assert refused > 0
    assert worked > 0
    check(js, before)
"""
)


@pytest.mark.contract("S18")
def test_descriptor_limit(method: str, tmp_path: Path, gate: Gate) -> None:
    """Without descriptors submit raises OSError, wherever in it they run out."""
    script = tmp_path / "program.py"
    script.write_text(DESCRIPTORS)

    done = run_program([str(script), method, gate.directory])

    assert (done.stdout, done.stderr) == ("2\n", "")


FIRST = (
    PRELUDE
    + """
if __name__ == "__main__":
    tasks = None if sys.argv[3] == "warm" else 1
    other = Jobserver(method, 1, max_tasks_per_child=1)
    other.submit(nothing).result(PATIENCE)
    steady_fds(other)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    refused = 0
    for spare in range(10):
        js = Jobserver(method, 2, max_tasks_per_child=tasks)
        used = open_fds()
        free = [number for number in range(1000) if number not in used]
        limit(resource.RLIMIT_NOFILE, free[spare])
        taken = []
        try:
            js.submit(os.getpid, timeout=PATIENCE)
        except OSError as error:
            assert error.errno == errno.EMFILE, error
            assert "tracked=0" in repr(js)
            refused += 1
            # Numbers that were closed are used anew, and nothing of the failed call closes them.
            limit(resource.RLIMIT_NOFILE, usual)
            taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(6)]
        limit(resource.RLIMIT_NOFILE, usual)
        for number in taken:
            os.close(number)
        settle(js)
        assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
        # The user's own fork finds nothing to close that is not there.
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
    assert refused > 3
    print(free_slots(js, Gate(Path(directory))))
"""
)


@pytest.mark.contract("S18")
@pytest.mark.parametrize("tasks", ["fresh", "warm"])
def test_descriptor_limit_at_the_first_submit(
    method: str, tasks: str, tmp_path: Path, gate: Gate
) -> None:
    """A Jobserver whose first submit finds no descriptor has nothing in flight, and works on."""
    script = tmp_path / "program.py"
    script.write_text(FIRST)

    done = run_program([str(script), method, gate.directory, tasks])

    assert (done.stdout, done.stderr) == ("2\n", "")


THREADED = (
    PRELUDE
    + """
import threading, time

if __name__ == "__main__":
    js = Jobserver(method, 2)
    gate = Gate(Path(directory))
    job = js.submit(gate.enter)
    (worker,) = gate.await_entered(1)
    got = []
    thread = threading.Thread(target=lambda: got.append(job.result()))
    thread.start()
    wait_until(lambda: js._shared.reactor._leading, "the thread to wait")
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit(resource.RLIMIT_NOFILE, 3)
    # Looks without a pause, and so mostly sees the answer before the thread that waits for it.
    gate.open()
    deadline = time.monotonic() + PATIENCE
    while not job.done() and time.monotonic() < deadline:
        js.reclaim_resources()
    thread.join(PATIENCE)
    limit(resource.RLIMIT_NOFILE, usual)
    assert got == [worker], got
    print("ok")
"""
)


@pytest.mark.contract("S18", "H13")
def test_waiting_thread_hears_without_descriptors(tmp_path: Path, gate: Gate) -> None:
    """While no descriptor is free, a thread that waits learns of what another one reaps."""
    script = tmp_path / "program.py"
    script.write_text(THREADED)

    done = run_program([str(script), "fork", gate.directory])

    assert (done.stdout, done.stderr) == ("ok\n", "")


BUSY = (
    PRELUDE
    + """
if __name__ == "__main__":
    js = Jobserver(method, 3)
    js.submit(nothing).result(PATIENCE)
    before = steady_fds(js)
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    inner = Path(directory, "inner")
    inner.mkdir()
    gate = Gate(inner)
    running = js.submit(gate.enter)
    gate.await_entered(1)
    seen = []
    running.when_done(seen.append, "called")
    # Not one more, in whatever gap: only stdin, stdout and stderr are below.
    limit(resource.RLIMIT_NOFILE, 3)
    for _ in range(3):
        try:
            js.submit(nothing, timeout=0)
        except OSError:
            pass
        else:
            raise AssertionError("started without descriptors")
    gate.open()
    worker = running.result(PATIENCE)
    assert seen == ["called"]
    limit(resource.RLIMIT_NOFILE, usual)
    assert [worker] == gate.entered()
    check(js, before)
"""
)


@pytest.mark.contract("S18", "F6", "F13")
def test_running_jobs_finish_without_descriptors(method: str, tmp_path: Path, gate: Gate) -> None:
    """Jobs that run already are reaped, with their callbacks, while no descriptor is free."""
    script = tmp_path / "program.py"
    script.write_text(BUSY)

    done = run_program([str(script), method, gate.directory])

    assert (done.stdout, done.stderr) == ("3\n", "")


MAKING = (
    PRELUDE
    + """
if __name__ == "__main__":
    with Jobserver(method, 1) as js:
        js.submit(nothing).result(PATIENCE)
        steady_fds(js)
    del js
    # Its pool is gone with it.
    before = len(open_fds())
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    refused = 0
    for spare in range(12):
        limit(resource.RLIMIT_NOFILE, before + spare)
        try:
            Jobserver(method, 2)
        except OSError:
            refused += 1
        limit(resource.RLIMIT_NOFILE, usual)
        assert len(open_fds()) == before, (spare, open_fds())
    js = Jobserver(method, 2)
    assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
    settle(js)
    print(free_slots(js, Gate(Path(directory))))
"""
)


@pytest.mark.contract("S18", "J1")
def test_making_a_jobserver_without_descriptors(method: str, tmp_path: Path, gate: Gate) -> None:
    """A constructor that fails for want of descriptors leaves none open."""
    script = tmp_path / "program.py"
    script.write_text(MAKING)

    done = run_program([str(script), method, gate.directory])

    assert (done.stdout, done.stderr) == ("2\n", "")


PROCESSES = (
    PRELUDE
    + """
if __name__ == "__main__":
    # Imports all that is imported late, which this user's files may not allow later. A fork
    # server that ran already would not be bound by limits that are set later.
    first = Jobserver(method, 1)
    if method != "forkserver":
        first.submit(nothing).result(PATIENCE)
        steady_fds(first)
    del first
    if os.getuid() == 0:
        # The limit does not hold for root.
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    js = Jobserver(method, 2)
    usual = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limit(resource.RLIMIT_NPROC, 0)
    before = 0
    for consume in (1, 1, 1, 0):
        try:
            js.submit(nothing, consume=consume, timeout=0)
        except OSError as error:
            assert isinstance(error, BlockingIOError), repr(error)
        else:
            raise AssertionError("started in spite of the limit")
        before = before or len(open_fds())
    assert len(open_fds()) == before, (len(open_fds()), before)
    limit(resource.RLIMIT_NPROC, usual)
    if method == "fork" or os.access(sys.executable, os.X_OK):
        js.submit(nothing).result(PATIENCE)
        check(js, steady_fds(js))
    else:
        print("no interpreter for this user")
"""
)


def readable_by_nobody() -> bool:
    """Whether an unprivileged user could start this interpreter."""
    path = Path(sys.executable).resolve()
    return all(part.stat().st_mode & 0o1 for part in [path, *path.parents])


@pytest.mark.contract("S18")
def test_process_limit(method: str, tmp_path: Path) -> None:
    """Without processes submit raises an OSError that says so; afterwards work goes on."""
    script = tmp_path / "program.py"
    script.write_text(PROCESSES)
    # pytest keeps its directories to itself, and the program becomes somebody else.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        done = run_program([str(script), method, directory])

    assert done.stderr == ""
    if method == "fork" or os.getuid() != 0 or readable_by_nobody():
        assert done.stdout == "2\n"
    else:
        assert done.stdout in ("2\n", "no interpreter for this user\n")


SERVER = """
import os, resource, sys
from pathlib import Path
from jobserver import Jobserver, SubmissionDied
from helpers import PATIENCE, Gate, free_slots, identity, open_fds, settle, steady_fds

if __name__ == "__main__":
    js = Jobserver("forkserver", 2)
    server = js.submit(os.getppid).result(PATIENCE)
    before = steady_fds(js)
    soft, hard = resource.prlimit(server, resource.RLIMIT_NOFILE)
    held = len(open_fds(server))
    failed = 0
    for few in range(3, held + 8):
        resource.prlimit(server, resource.RLIMIT_NOFILE, (few, hard))
        try:
            assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
        except (OSError, SubmissionDied):
            failed += 1
        resource.prlimit(server, resource.RLIMIT_NOFILE, (soft, hard))
        settle(js)
        assert js.submit(identity, args=(1,)).result(PATIENCE) == 1
    assert failed > 0
    assert js.submit(os.getppid).result(PATIENCE) == server
    assert steady_fds(js) == before
    print(free_slots(js, Gate(Path(sys.argv[1]))))
"""


@pytest.mark.contract("S18")
def test_fork_server_without_descriptors(tmp_path: Path, gate: Gate) -> None:
    """A fork server that runs out of descriptors refuses a job and serves the next."""
    script = tmp_path / "program.py"
    script.write_text(SERVER)

    done = run_program([str(script), gate.directory])

    assert (done.stdout, done.stderr) == ("2\n", "")


PLAIN = (
    PRELUDE
    + """
from multiprocessing import Pipe

def enter(js, gate, connection):
    gate.enter()
    below = js.submit(os.getppid).result()  # lends, if it must, and has a bell
    connection.send(os.getpid())
    return below

if __name__ == "__main__":
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit(resource.RLIMIT_NOFILE, 32)
    js = Jobserver(method, 12)  # a quarter of the limit is for berths: there are fewer than slots
    limit(resource.RLIMIT_NOFILE, usual)
    gate = Gate(Path(directory))
    futures = []
    for _ in range(12):
        reader, writer = Pipe(duplex=False)
        futures.append((reader, js.submit(enter, args=(js, gate, writer))))
        writer.close()
    pids = gate.await_entered(12)
    gate.open()
    for _, future in futures:
        future.result(PATIENCE)
    print(sorted(reader.recv() for reader, _ in futures) == pids)
    settle(js)
    for reader, _ in futures:
        reader.close()
    second = Path(directory) / "second"
    second.mkdir()
    print(free_slots(js, Gate(second)))
    with js:
        pass
"""
)


def test_more_slots_than_descriptors_to_park_them_by(
    method: str, tmp_path: Path, gate: Gate
) -> None:
    """A job on a plain token gets what descriptors are its own, and may submit like any other."""
    program = tmp_path / "program.py"
    program.write_text(PLAIN)
    done = run_program([str(program), method, gate.directory])
    assert (done.stdout, done.stderr) == ("True\n12\n", "")
