# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Huge pages for programs whose forks are dear: which memory, when, and for how long at most."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import PATIENCE, Gate, await_end, open_fds, steady_fds, wait_until
from hypothesis import given
from hypothesis import strategies as st

from jobserver import Jobserver, _collapse, _memory, _native
from jobserver._collapse import _AFTER, _AT_ONCE, _BOTH, _GROWS, Collapser, worth_it
from jobserver._launch import _fork

try:
    HUGE = _collapse._huge_page()
except OSError:
    HUGE = 0
MANY = 8 * HUGE


def mapped() -> mmap.mmap:
    """Memory of this process alone, none of it used yet, in pages of the usual size."""
    memory = mmap.mmap(-1, MANY + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def within(memory: mmap.mmap) -> list[tuple[int, int]]:
    """What of it is worth to be collapsed."""
    start = -(-_native.address_of(memory) // HUGE) * HUGE
    return worth_it(_native, start, MANY, HUGE)


def collapses() -> bool:
    """Whether this kernel has huge pages to give, now."""
    if not HUGE:
        return False
    with mapped() as memory:
        memory[:] = b"+" * len(memory)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return all(itertools.starmap(_native.collapse, within(memory)))


needs_huge_pages = pytest.mark.skipif(not collapses(), reason="the kernel has no huge pages here")

PROGRAM = """
import sys
from jobserver import Jobserver
from jobserver._launch import _fork
from jobserver._worker import _zygote

_fork.DEAR = _zygote.DEAR = 0.0  # however fast this machine forks
kept = [b"%07d" % number + bytes(4000) for number in range(16 << 10)]

def huge(pid="self"):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        (line,) = (line for line in file if line.startswith("AnonHugePages:"))
    return int(line.split()[1])

def one(number):
    return kept[number]

if __name__ == "__main__":
    method = sys.argv[1]
    with Jobserver(method, 2) as js:
        for count in range(1000):
            number = count * 16
            assert js.submit(one, args=(number,)).result()[:7] == b"%07d" % number
            forker = "self"
            if method == "forkserver":
                from jobserver._launch._zygote import client
                forker = client()._pid
            if huge(forker) > (32 << 10):
                break
        print(huge(forker), [kept.index(one(n)) for n in (0, 7, 9999)])
"""


@needs_huge_pages
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_who_forks_jobs_with_much_memory_comes_to_have_it_in_huge_pages(
    tmp_path: Path, method: str
) -> None:
    """A program of 64 MB, or the zygote that imported it, gets huge pages, and nothing moves."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), method],
        capture_output=True,
        text=True,
        check=False,
        timeout=3 * PATIENCE,
    )
    assert done.stderr == ""
    found, rest = done.stdout.split(None, 1)
    assert int(found) > (32 << 10), "most of it, in kB"
    assert rest == "[0, 7, 9999]\n"


@needs_huge_pages
@pytest.mark.parametrize("_again", range(3))
def test_memory_that_is_written_to_meanwhile_keeps_what_is_written(_again: int) -> None:
    """To collapse loses no write of another thread."""
    ended = threading.Event()
    with mapped() as memory:
        memory[:] = b"+" * len(memory)
        memory.madvise(mmap.MADV_HUGEPAGE)
        places = range(5, len(memory), mmap.PAGESIZE)
        rounds = 0

        def write() -> None:
            nonlocal rounds
            while not ended.is_set():
                for place in places:
                    memory[place] = (memory[place] + 1) % 256
                rounds += 1

        thread = threading.Thread(target=write)
        thread.start()
        try:
            wait_until(lambda: rounds, "the writer to begin")
            assert all(itertools.starmap(_native.collapse, within(memory)))
        finally:
            ended.set()
            thread.join()
        assert {memory[place] for place in places} == {(ord("+") + rounds) % 256}


@needs_huge_pages
def test_memory_that_was_only_read_does_not_become_memory() -> None:
    """What looks used and is the kernel's page of zeros makes a round end before it costs much."""
    size = _memory.resident()
    with mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        assert memory.find(b"+") < 0  # all of it has been read now
        memory.madvise(mmap.MADV_HUGEPAGE)
        # The kernel does not collapse zeros alone.
        for place in range(0, len(memory), HUGE):
            memory[place] = 1
        before = _memory.resident()
        for _ in _collapse.collapsing():
            pass
        assert _memory.resident() < before * (1 + _GROWS) + _AT_ONCE + (4 << 20)


def test_memory_that_is_mapped_anew_is_looked_up_anew() -> None:
    """A piece is of memory that is this process's own, and lies behind those seen so far."""
    with mapped() as memory:
        start = -(-_native.address_of(memory) // HUGE) * HUGE
        inside = [piece for piece in _collapse._pieces(start, HUGE) if piece[0] < start + MANY]
        assert inside[0][0] == start
        assert sum(length for _address, length in inside) >= MANY
        behind = list(_collapse._pieces(start + HUGE, HUGE))
        assert min(address for address, _length in behind) == start + HUGE
    with mmap.mmap(-1, MANY + HUGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as shared:
        address = _native.address_of(shared)
        for piece, length in _collapse._pieces(0, HUGE):
            assert not piece <= address < piece + length, "it is shared"


@pytest.mark.skipif(not HUGE, reason="the kernel has no huge pages here")
def test_memory_that_is_hardly_used_stays_as_it_is() -> None:
    """A range of which a third is in use is not made a huge page, one that is in use is."""
    with mapped() as memory:
        start = _native.address_of(memory)
        first = -(-start // HUGE) * HUGE - start
        for place in range(first, first + MANY - HUGE, 3 * mmap.PAGESIZE):
            memory[place] = 1
        assert within(memory) == []
        full = first + 2 * HUGE
        memory[full : full + 2 * HUGE] = b"+" * 2 * HUGE
        assert within(memory) == [(start + full, 2 * HUGE)]
    assert worth_it(_native, 1 << 46, MANY, HUGE) == [], "not mapped"


class Books:
    """What was spent on forks and on collapsing, by a Collapser whose rounds are as told."""

    def __init__(self, pieces: list[float]) -> None:
        self.size = 100 << 20  # of the process
        self.forks = self.collapsing = 0.0
        self.rounds: list[float] = []  # what forks had cost when each began
        self._pieces = pieces
        self.collapser = Collapser(self._a_round, lambda: self.size)

    def fork(self, seconds: float) -> None:
        """One fork."""
        self.forks += seconds
        self.collapser.forked(seconds)

    def _a_round(self) -> Iterator[float]:
        self.rounds.append(self.forks)
        for piece in self._pieces:
            self.collapsing += piece
            yield piece


SECONDS = st.floats(1e-4, 0.1)


@given(forks=st.lists(SECONDS, max_size=200), pieces=st.lists(st.floats(0, 0.5), max_size=20))
def test_collapsing_takes_no_longer_than_forks_have(
    forks: list[float], pieces: list[float]
) -> None:
    """All in all and in each call: not more than forks and their children's ends, and a piece."""
    books = Books(pieces)
    piece = max(pieces, default=0) + 1e-9
    for seconds in forks:
        before = books.collapsing
        books.fork(seconds)
        assert books.collapsing <= _BOTH * books.forks + piece
        assert books.collapsing - before <= _BOTH * seconds + piece, "within one call"


def test_a_program_that_forks_little_is_left_alone() -> None:
    """Nothing is done before forks have cost so much that it could matter."""
    books = Books([0.001])
    while _BOTH * (books.forks + 0.002) < _AFTER:
        books.fork(0.001)
    assert books.rounds == []
    for _ in range(3):
        books.fork(0.001)
    assert len(books.rounds) == 1


def test_rounds_that_are_of_no_use_become_rare() -> None:
    """Where forks remain as dear as they were, each round comes after a longer time."""
    books = Books([0.03] * 4)
    for _ in range(20_000):
        books.fork(0.001)
    pauses = [later - earlier for earlier, later in zip(books.rounds, books.rounds[1:])]
    assert len(pauses) >= 3
    assert all(later > 2 * earlier for earlier, later in zip(pauses, pauses[1:]))


def test_rounds_that_are_of_use_go_on() -> None:
    """Where a round has made forks cheaper, memory that is dear again is collapsed again."""
    books = Books([0.03])
    for _ in range(6):
        rounds = len(books.rounds)
        price = 0.001 * 0.5**rounds
        while len(books.rounds) == rounds:
            books.fork(price)
    pauses = [later - earlier for earlier, later in zip(books.rounds, books.rounds[1:])]
    assert max(pauses) < 2 * min(pauses)


def test_what_a_forked_process_has_inherited_stays_shared() -> None:
    """A child of a large program does not copy that program's memory to have it in huge pages."""
    books = Books([0.001])
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for books.size in (100 << 20, 190 << 20, 210 << 20):
                rounds = len(books.rounds)
                for _ in range(1000):
                    books.fork(0.001)
                os.write(writer, b"+" if len(books.rounds) > rounds else b"-")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as told:
        assert told.read() == b"--+", "only once most of it is its own"
    assert os.waitpid(pid, 0) == (pid, 0)
    for _ in range(1000):
        books.fork(0.001)
    assert books.rounds, "its parent does at once"


def test_a_small_program_is_left_alone_until_it_has_grown() -> None:
    """Where there is little memory nothing is done, and that does not delay what comes later."""
    books = Books([0.001])
    books.size = 20 << 20
    for _ in range(1000):
        books.fork(0.001)
    assert books.rounds == []
    books.size = 200 << 20
    before = books.forks
    while not books.rounds:
        books.fork(0.001)
    assert _BOTH * (books.forks - before) < 2 * _AFTER


def test_whatever_goes_wrong_ends_the_round() -> None:
    """An exception amid a round does not reach the submitter, and it is long until the next."""
    begun: list[int] = []

    def broken() -> Iterator[float]:
        begun.append(1)
        yield 0.001
        raise OSError("no /proc")

    collapser = Collapser(broken, lambda: 100 << 20)
    for _ in range(5000):
        collapser.forked(0.001)
    assert begun == [1]


def test_an_interrupt_amid_a_round_ends_the_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An exception out of a handler leaves no job that runs without a slot, and no slot lost."""

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    gate = Gate(tmp_path)
    with Jobserver("fork", 1, max_tasks_per_child=1) as js:
        js.submit(len, args=((),)).result()
        with monkeypatch.context() as patch:
            patch.setattr(_fork, "DEAR", -1.0)
            patch.setattr(_fork, "forked", interrupted)
            steady_fds(js)  # the pidfd of a job that has answered may be open a moment longer
            fds = open_fds()
            with pytest.raises(KeyboardInterrupt):
                js.submit(gate.enter)
            assert open_fds() == fds
        js.submit(len, args=((),), timeout=PATIENCE).result()
    for pid in gate.entered():
        await_end(pid)


@needs_huge_pages
def test_nothing_is_collapsed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less to be had than twice what the process has, a round does nothing."""

    def refuse(*_: Any) -> bool:
        raise AssertionError("collapsed")

    monkeypatch.setattr(_native, "collapse", refuse)
    monkeypatch.setattr(_collapse, "available", lambda: 2 * _memory.resident() - (1 << 20))
    assert list(_collapse.collapsing()) == []


def test_the_memory_that_can_be_had_is_some_of_the_machines() -> None:
    """More than nothing, and less than the machine has."""
    total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    assert 0 < _memory.available() < total
    assert 0 < _memory.resident() < total


V2 = {"0::": ("", "memory.max", "memory.current", "inactive_file")}
V1 = {
    "7:cpu,memory:": (
        "memory/",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    )
}
HIGH = {"0::": ("", "memory.high", "memory.current", "inactive_file")}


@pytest.mark.parametrize("version", [V2, V1, HIGH], ids=["v2", "v1", "high"])
@pytest.mark.parametrize(
    ("own", "above", "left"),
    [
        ("max", "max", None),
        ("3000000", "max", 2_100_000),
        ("max", "2000000", 1_100_000),
        ("3000000", "2000000", 1_100_000),
        ("500000", "max", 0),
    ],
)
def test_the_limits_of_control_groups_count(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: dict[str, tuple[str, ...]],
    own: str,
    above: str,
    left: Any,
) -> None:
    """The tightest group of all above decides; what was only read from files is no use of it."""
    machine = _memory.available()
    ((line, (mount, limit, usage, cache)),) = version.items()
    groups = tmp_path / "proc"
    groups.write_text(f"4:pids:/a\n{line}/a/b\n")
    for name, most in (("a/b", own), ("a", above)):
        group = tmp_path / "cgroup" / mount / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(most + "\n")
        (group / usage).write_text("1000000\n")
        (group / "memory.stat").write_text(f"anon 900000\n{cache} 100000\n")
    monkeypatch.setattr(_memory, "_CGROUPS", str(tmp_path / "cgroup"))
    monkeypatch.setattr(_memory, "_GROUPS", str(groups))
    found = _memory.available()
    if left is None:
        assert found > machine // 2
    else:
        assert found == left
