# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""After very many jobs: the same descriptors, no zombie, memory flat."""

from __future__ import annotations

import pytest
from helpers import run_program

PROGRAM = """
import gc, os, sys
from jobserver import CallbackRaised, Jobserver, SubmissionDied
from helpers import (
    PATIENCE, descendants, hard_exit, identity, nothing, open_fds, resident_bytes, steady_fds
)

def some(js, count):
    # Results, exceptions, deaths, callbacks, dropped Futures, maps and timeouts in turn.
    for number in range(count // 8):
        assert js.submit(identity, args=(number,)).result() == number
        js.submit(nothing).when_done(nothing)
        future = js.submit(identity, args=(bytes(70_000),))
        future.when_done(int, "no number")
        try:
            future.wait()
        except CallbackRaised:
            pass
        try:
            js.submit(hard_exit, args=(1,)).result()
        except SubmissionDied:
            pass
        try:
            js.submit(int, args=("no number",)).result()
        except ValueError:
            pass
        js.submit(nothing, consume=0)
        assert list(js.map(identity, [(1,), (2,)])) == [1, 2]
    return steady_fds(js)

def server():
    return resident_bytes(os.getppid())

if __name__ == "__main__":
    method, warm, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    js = Jobserver(method, 2)
    fds = some(js, warm)
    processes = len(descendants())
    forks = method == "forkserver" and js.submit(server).result()
    gc.collect()
    memory = resident_bytes()
    assert some(js, count) == fds, open_fds()
    assert "Z" not in descendants().values()
    assert len(descendants()) == processes, descendants()
    gc.collect()
    grown = resident_bytes() - memory
    assert grown < 1_500_000, f"grown by {grown} bytes"
    if forks:
        grown = js.submit(server).result() - forks
        assert grown < 1_500_000, f"the server has grown by {grown} bytes"
    print(len(gc.garbage))
"""


def run(tmp_path: object, method: str, warm: int, count: int, timeout: float) -> None:
    """Run the program; it says by itself what has grown."""
    done = run_program([f"{tmp_path}/program.py", method, str(warm), str(count)], timeout=timeout)

    assert done.stderr == ""
    assert done.stdout == "0\n"


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Where the program is."""
    path = tmp_path_factory.mktemp("flat")
    (path / "program.py").write_text(PROGRAM)
    return path


#: So many jobs to warm up, and so many that may then change nothing.
COUNTS = {"fork": (240, 1800), "spawn": (8, 24), "forkserver": (240, 800)}


@pytest.mark.contract("S18", "F26")
def test_many_jobs(directory: object, method: str) -> None:
    """After 2,000 jobs of all kinds nothing has grown (forkserver: 1,000, spawn: 32)."""
    run(directory, method, *COUNTS[method], timeout=60)


@pytest.mark.slow
@pytest.mark.contract("S18", "F26")
@pytest.mark.parametrize("count", [100_000])
def test_hundred_thousand_jobs(directory: object, method: str, count: int) -> None:
    """After 100,000 jobs of all kinds nothing has grown (spawn: 5,000)."""
    run(directory, method, 2000, count if method != "spawn" else 5000, timeout=3600)
