# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The main job: the same report whoever makes it, whatever is in the tree, whoever is killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import METHODS, program_environment, run_program, session_members, started_program
from helpers import wait_until as wait_until_true

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPT = EXAMPLES / "archive_report.py"

# The script finds its package beside itself; so do these tests.
sys.path.insert(0, str(EXAMPLES))

import archive.crew as archive_crew  # noqa: E402
import archive_report  # noqa: E402
from archive.folders import Task, count_files, perform, scan  # noqa: E402
from archive.foreman import run_alone, run_crew  # noqa: E402
from archive.journal import (  # noqa: E402
    DEAD,
    FILE_ENDED,
    FOLDER_ENDED,
    RUNNING,
    SHOT,
    WAITING,
    Badge,
    Journal,
    Reader,
    Record,
    peak,
)
from archive.measure import measure  # noqa: E402
from archive.show import printable  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRESS = re.compile(r"(jobs|serial): {1,3}(\d+)% of [\d,]+ files?, \d+\.\d s")


# An independent idea of what the root hash is


def merkle_root(path: Path) -> str:
    """The root hash as the documentation of `archive.report.listing` has it."""
    return kind_and_digest(os.fsencode(path))[1]


def kind_and_digest(path: bytes) -> tuple[bytes, str]:
    if os.path.islink(path):
        return b"link", hashlib.sha256(os.readlink(path)).hexdigest()
    if os.path.isdir(path):
        listing = hashlib.sha256()
        for name in sorted(os.listdir(path)):
            if name not in (b"__pycache__", b"site-packages"):
                kind, digest = kind_and_digest(os.path.join(path, name))
                listing.update(b"%s %s %d %s\n" % (kind, digest.encode(), len(name), name))
        return b"folder", listing.hexdigest()
    if os.path.isfile(path):
        with open(path, "rb") as stream:
            return b"file", hashlib.sha256(stream.read()).hexdigest()
    return b"special", hashlib.sha256().hexdigest()


# Trees and runs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three levels of folders, one of them empty, with seven files, one of them empty."""
    root = tmp_path / "tree"
    (root / "a" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "top.py").write_text("def f():\n    return 1\n")
    (root / "empty.py").touch()
    (root / "words.txt").write_text("one two three\n" * 200)
    (root / "a" / "one.py").write_text(
        "class C:\n    def m(self): ...\n    async def n(self): ...\n"
    )
    (root / "a" / "data.bin").write_bytes(bytes(range(256)) * 8)
    (root / "a" / "deep" / "two.py").write_text("x = [1, 2, 3]\n")
    (root / "a" / "deep" / "three.py").write_text("# nothing but a comment")
    return root


@pytest.fixture
def grove(tmp_path: Path) -> Path:
    """Enough folders and files that some of each are bound to be shot."""
    root = tmp_path / "grove"
    for folder in range(4):
        for sub in range(2):
            place = root / f"f{folder}" / f"g{sub}"
            place.mkdir(parents=True)
            for number in range(6):
                text = f"def f{number}():\n    return {folder}\n" * (20 + number)
                (place / f"m{number}.py").write_text(text)
    return root


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script from a directory that is not its own."""
    return run_program([str(SCRIPT), *map(str, arguments)], cwd=Path("/"))


def report_json(*arguments: object) -> dict[str, Any]:
    """What --json prints, of a run that complains of nothing."""
    done = report(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert all(PROGRESS.fullmatch(line) for line in done.stderr.splitlines()), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ignore(_files: int) -> None:
    """Show no progress."""


# The report


@pytest.mark.parametrize(
    ("method", "slots"),
    [("fork", 1), ("fork", 2), ("fork", 3), ("spawn", 2), ("forkserver", 2)],
)
def test_root_hash_is_always_the_same(tree: Path, method: str, slots: int) -> None:
    """Whatever the start method and the slots, the hash is the serial one and each node a job."""
    found = report_json(tree, "--context", method, "--slots", slots)

    assert found["root_hash"] == found["serial_root_hash"] == merkle_root(tree)
    assert (found["files"], found["folders"], found["jobs"]) == (7, 4, 11)
    assert 1 <= found["peak_running"] <= slots
    assert (found["killed"], found["retried"]) == (0, 0)


@pytest.mark.parametrize("method", METHODS)
def test_killed_jobs_are_retried_and_the_hash_stays(grove: Path, method: str) -> None:
    """With --kill-some jobs die, folders' jobs among them, and the report is none the worse."""
    # A spawned worker takes as long to start as ten forked ones.
    root = grove / "f0" if method == "spawn" else grove
    found = report_json(root, "--kill-some", "--context", method, "--slots", 2)

    assert found["root_hash"] == found["serial_root_hash"]
    assert found["killed"] >= 1
    assert 1 <= found["retried"] <= found["killed"]
    assert found["jobs"] > found["files"] + found["folders"]
    assert 1 <= found["peak_running"] <= 2


@pytest.mark.parametrize("slots", [1, 3])
def test_killing_breaks_neither_few_nor_many_slots(grove: Path, slots: int) -> None:
    """Orphans of killed folders hold slots of their own: no more run than there are."""
    found = report_json(grove, "--kill-some", "--slots", slots)

    assert found["root_hash"] == merkle_root(grove)
    assert found["retried"] >= 1
    assert 1 <= found["peak_running"] <= slots


def test_json_says_it_all(tree: Path) -> None:
    """--json prints one object with these members and nothing else."""
    found = report_json(tree, "--slots", 2)

    kinds: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("path", "root_hash", "serial_root_hash", "python", "context"), (str,)),
        **dict.fromkeys(("files", "folders", "size", "packed", "tokens", "lines"), (int,)),
        **dict.fromkeys(("functions", "slots", "jobs", "peak_running"), (int,)),
        **dict.fromkeys(("killed", "retried"), (int,)),
        **dict.fromkeys(("seconds", "serial_seconds", "speedup"), (float,)),
        **dict.fromkeys(("stages", "serial_stages"), (dict,)),
        **dict.fromkeys(("largest", "slowest", "best_compressed", "problems"), (list,)),
    }
    assert found.keys() == kinds.keys()
    assert all(isinstance(found[name], kind) for name, kind in kinds.items())
    assert found["speedup"] == pytest.approx(found["serial_seconds"] / found["seconds"])
    assert sum(found["stages"].values()) == pytest.approx(2 * found["seconds"])
    assert sum(found["serial_stages"].values()) == pytest.approx(found["serial_seconds"])
    assert found["functions"] == 3
    assert found["lines"] == 2 + 200 + 3 + 9 + 1 + 1
    assert found["size"] == sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    assert found["largest"][0]["path"] == "words.txt"
    assert {row["path"] for row in found["best_compressed"]} == {"words.txt", "a/data.bin"}
    assert found["problems"] == [{"path": "a/data.bin", "kind": "binary", "detail": "2,048 bytes"}]


def test_without_the_serial_run(tree: Path) -> None:
    """--no-serial leaves out what only the serial run could tell."""
    found = report_json(tree, "--no-serial")

    assert found["root_hash"] == merkle_root(tree)
    assert found["serial_root_hash"] is found["serial_seconds"] is found["speedup"] is None


def test_table_for_people(tree: Path) -> None:
    """Without --json there is a table that names the files, the hash, the jobs and the times."""
    done = report(tree, "--slots", 2)

    assert done.returncode == 0
    assert "7 files in 4 folders: 216 lines, 3 functions" in done.stdout
    assert f"root hash {merkle_root(tree)}" in done.stdout
    for heading in ("largest", "slowest", "best compressed", "where the time went, in seconds"):
        assert f"\n{heading} " in done.stdout
    assert re.search(r"^  words\.txt +2,800 ", done.stdout, re.MULTILINE)
    assert re.search(r"^11 jobs in 2 slots \(fork\), at most [12] ", done.stdout, re.MULTILINE)
    assert "binary: 1\n  a/data.bin: 2,048 bytes\n" in done.stdout
    assert re.search(r"times as fast as the serial run, with the same root hash$", done.stdout)


def test_the_default_is_the_standard_library() -> None:
    """Without a PATH it is the running interpreter's standard library."""
    options = archive_report.parse([])

    assert options.path == Path(sysconfig.get_paths()["stdlib"]).resolve()
    assert options.slots == len(os.sched_getaffinity(0))


# What a tree may contain


def test_odd_files_are_reported_and_not_fatal(tree: Path) -> None:
    """Whatever is in the way of a report is named in it, and the rest is reported."""
    (tree / "bad.py").write_text("def f(:\n")
    (tree / "unknown.py").write_text("# coding: klingon\nx = 1\n")
    (tree / "rot.py").write_text("# coding: rot13\nx = 1\n")
    (tree / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (tree / "nul.py").write_bytes(b"x = 1\0\n")
    (tree / "wide.py").write_text(f"x = '{'a' * 70_000}'\n")
    (tree / "unfinished.txt").write_text("it's (unfinished\n  as\n Python")
    (tree / os.fsdecode(b"odd\xff\nname.py")).write_text("y = 1\n")
    (tree / "dangling").symlink_to("/nowhere")
    (tree / "up").symlink_to("..")
    (tree / "same.py").symlink_to("top.py")
    os.mkfifo(tree / "fifo.py")

    found = report_json(tree, "--slots", 2)

    assert found["root_hash"] == found["serial_root_hash"] == merkle_root(tree)
    assert found["files"] == 7 + 12
    assert {(problem["path"], problem["kind"]) for problem in found["problems"]} == {
        ("a/data.bin", "binary"),
        ("bad.py", "syntax"),
        ("unknown.py", "syntax"),
        ("rot.py", "syntax"),
        ("nul.py", "binary"),
        ("wide.py", "not parsed"),
    }


def test_what_cannot_be_read_is_reported(tree: Path) -> None:
    """A file that does not fit into memory is unreadable; hashes agree all the same."""
    with (tree / "vast.bin").open("wb") as stream:
        stream.truncate(1 << 42)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 34, memory[1]))
    try:
        found = report_json(tree, "--slots", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, memory)

    (problem,) = (p for p in found["problems"] if p["kind"] == "unreadable")
    assert problem == {"path": "vast.bin", "kind": "unreadable", "detail": "MemoryError()"}
    assert found["root_hash"] == found["serial_root_hash"]


def test_what_has_vanished_is_reported(tmp_path: Path) -> None:
    """A file or folder that is gone when its turn comes is unreadable, and says why."""
    gone = tmp_path / "gone.py"

    assert measure(gone).kind == "unreadable"
    assert measure(gone).problems == ((gone, "unreadable", "No such file or directory"),)
    assert scan(gone) == ("unreadable", [], [(gone, "unreadable", "No such file or directory")])


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_what_is_forbidden_is_reported(tree: Path) -> None:
    """Files and folders without permission are unreadable."""
    (tree / "top.py").chmod(0)
    (tree / "a").chmod(0)
    try:
        found = report_json(tree)
    finally:
        (tree / "a").chmod(0o700)

    unreadable = {p["path"]: p["detail"] for p in found["problems"] if p["kind"] == "unreadable"}
    assert unreadable == {"top.py": "Permission denied", "a": "Permission denied"}


def test_links_count_for_where_they_point(tree: Path) -> None:
    """A link is not followed, and the hash changes with its target."""
    (tree / "link").symlink_to("a")
    first = run_alone(tree, ignore).report
    (tree / "link").unlink()
    (tree / "link").symlink_to("b")
    second = run_alone(tree, ignore).report

    assert (first.files, first.folders) == (second.files, second.folders) == (8, 4)
    assert first.digest != second.digest


def test_caches_and_site_packages_are_left_out(tree: Path) -> None:
    """What is in __pycache__ and site-packages does not count, at any depth."""
    before = run_alone(tree, ignore).report
    for name in ("__pycache__", "site-packages"):
        (tree / "a" / name).mkdir()
        (tree / "a" / name / "more.py").touch()
    after = run_alone(tree, ignore).report

    assert after.digest == before.digest
    assert count_files(tree) == after.files == 7


def test_a_deep_tree_needs_no_more_slots(tmp_path: Path) -> None:
    """One slot is enough for any depth."""
    bottom = tmp_path / "tree" / Path(*"abcdefghijklmnopqrstuvwxyz")
    bottom.mkdir(parents=True)
    (bottom / "leaf.py").write_text("pass\n")

    run = run_crew(tmp_path / "tree", "fork", 1, kill_some=False, on_files=ignore)

    assert run.report.digest.hex() == merkle_root(tmp_path / "tree")
    assert (run.jobs, run.peak_running) == (28, 1)


@pytest.mark.parametrize("option", ["--json", "--kill-some"])
def test_an_empty_folder_is_a_tree(tmp_path: Path, option: str) -> None:
    """Where there is nothing to report, that is reported."""
    done = report(tmp_path, option)

    assert done.returncode == 0, done.stderr
    assert hashlib.sha256().hexdigest() in done.stdout


def test_names_that_stdout_cannot_encode(tree: Path) -> None:
    """A table can be written in any encoding."""
    (tree / "na\u00efve.py").write_text("pass\n" * 2000)
    program = [str(SCRIPT), str(tree), "--no-serial"]
    done = run_program(program, env={"PYTHONIOENCODING": "ascii"})

    assert done.returncode == 0, done.stderr
    assert "\n  na\\xefve.py " in done.stdout


def test_names_are_shown_escaped() -> None:
    """Odd names break neither the table nor the terminal."""
    assert printable(os.fsdecode(b"a\xff\n\x1b[31m") + "é") == r"a\udcff\n\x1b[31mé"


# Jobs that die by themselves


def die_of(name: str) -> Any:
    """A stand-in for perform() that dies of every task of this name."""

    def dying(task: Task, team: Any) -> Any:
        if task.path.name == name:
            os.kill(os.getpid(), signal.SIGKILL)
        return perform(task, team)

    return dying


def test_a_deadly_file_is_hashed_and_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose jobs all die gets as many as are due, and then its hash without a job."""
    monkeypatch.setattr(archive_crew, "perform", die_of("two.py"))

    run = run_crew(tree, "fork", 2, kill_some=False, on_files=ignore)

    (problem,) = (p for p in run.report.problems if p.kind == "deadly")
    assert problem.path == tree / "a" / "deep" / "two.py"
    assert "SIGKILL" in problem.detail
    assert run.report.digest.hex() == merkle_root(tree)
    assert (run.killed, run.retried) == (archive_crew.ATTEMPTS, archive_crew.ATTEMPTS - 1)


def test_a_deadly_folder_ends_the_run(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be said of a folder whose jobs all die: the run fails, and leaves no job."""
    monkeypatch.setattr(archive_crew, "perform", die_of("deep"))

    with pytest.raises(archive_crew.DeadlyFolderError, match=r"deep: .*SIGKILL"):
        run_crew(tree, "fork", 2, kill_some=False, on_files=ignore)


# Arguments, progress, interruption


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere/at/all"], "No such file or directory"),
        ([SCRIPT], "Not a directory"),
        (["--slots", "0"], "0 is less than 1"),
        (["--slots", "-1"], "-1 is less than 1"),
        (["--slots", "two"], "invalid"),
        (["--slots"], "expected one argument"),
        (["--context", "thread"], "invalid choice"),
        (["--bogus"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(arguments: list[object], words: str) -> None:
    """What is wrong with the command line is said in one line, with status 2."""
    done = report(*arguments)

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("archive_report.py: error: ")
    assert words in line


def test_another_tree_is_another_status(tree: Path) -> None:
    """When the two runs see different trees, the report says so and fails."""
    changing = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import archive_report, pathlib\n"
        "alone = archive_report.run_alone\n"
        "def after_a_change(path, on_files):\n"
        "    (path / 'top.py').write_text('changed')\n"
        "    return alone(path, on_files)\n"
        "archive_report.run_alone = after_a_change\n"
        f"sys.exit(archive_report.main([{str(tree)!r}]))\n"
    )
    done = run_program(["-c", changing])

    assert done.returncode == 1
    assert done.stdout.rstrip().endswith("WITH ANOTHER ROOT HASH")


def test_progress_in_plain_lines(grove: Path) -> None:
    """Where stderr is no terminal, progress comes in at most eleven lines for each run."""
    lines = report(grove).stderr.splitlines()

    assert all(PROGRESS.fullmatch(line) for line in lines), lines
    for label in ("jobs", "serial"):
        tenths = [int(line.split("%")[0][-3:]) // 10 for line in lines if line.startswith(label)]
        assert tenths == sorted(set(tenths))
        assert tenths[-1] == 10


def test_progress_on_a_terminal(grove: Path) -> None:
    """On a terminal one line changes in place, and is gone at the end."""
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), str(grove), "--no-serial"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=slave,
            env=program_environment(),
            start_new_session=True,
        ) as process:
            output, _ = process.communicate(timeout=60)
        shown = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)

    assert process.returncode == 0
    assert output.startswith(b"Archive report of ")
    assert "\n" not in shown
    first, *_, last = shown.split("\r")
    assert first == ""
    assert PROGRESS.fullmatch(shown.split("\r")[1].replace("\x1b[K", ""))
    assert last == "\x1b[K"


@pytest.mark.parametrize("whole_group", [True, False], ids=["from-a-terminal", "to-main-alone"])
@pytest.mark.parametrize("method", METHODS)
def test_interruption_is_quiet(method: str, whole_group: bool) -> None:
    """Ctrl-C ends it with status 130, without a word, and no job runs on."""
    arguments = [str(SCRIPT), "--context", method, "--slots", "2"]
    with started_program(arguments) as process:
        assert process.stderr is not None
        assert PROGRESS.fullmatch(process.stderr.readline().rstrip())
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

        assert process.returncode == 130
        assert stdout == ""
        assert all(PROGRESS.fullmatch(line) for line in stderr.splitlines()), stderr
        wait_until_true(lambda: not session_members(process.pid), "the jobs to be gone")


# The journal


@contextlib.contextmanager
def reader_of(*marks: tuple[bytes, int, int]) -> Iterator[Reader]:
    """A reader of records made up: a mark, the job's number, the time."""
    reader = Reader()
    reader.records += [Record(mark, Badge(1, number), 100, when) for mark, number, when in marks]
    try:
        yield reader
    finally:
        reader.close()


def test_jobs_count_as_running_while_they_hold_a_slot() -> None:
    """Time inside submit and result, after a shot, and of unknown length does not count."""
    with reader_of(
        (RUNNING, 1, 0),
        (WAITING, 1, 10),  # lends to job 2
        (RUNNING, 2, 11),
        (FILE_ENDED, 2, 20),
        (RUNNING, 1, 21),
        (SHOT, 1, 25),
        (RUNNING, 1, 26),  # SIGKILL is not there yet
        (RUNNING, 3, 30),  # died by itself, nobody knows when
        (DEAD, 3, 99),
    ) as reader:
        assert sorted(reader.intervals()) == [(0, 10), (11, 20), (21, 25)]
        assert reader.killed() == {Badge(1, 1), Badge(1, 3)}
        assert reader.unfinished() == {}


def test_who_may_still_run() -> None:
    """Those who have begun and were neither seen to end nor shot, by age."""
    with reader_of(
        (RUNNING, 1, 0), (RUNNING, 2, 1), (RUNNING, 3, 2), (RUNNING, 4, 3), (SHOT, 2, 4)
    ) as reader:
        reader.records.append(Record(FOLDER_ENDED, Badge(1, 3), 100, 5))

        assert list(reader.unfinished()) == [Badge(1, 1), Badge(1, 4)]


def test_peak_is_the_most_at_one_instant() -> None:
    """Intervals that touch do not overlap."""
    assert peak([]) == 0
    assert peak([(0, 5), (5, 9)]) == 1
    assert peak([(0, 5), (1, 3), (2, 4), (4, 9)]) == 3


def test_records_of_many_processes_do_not_mix() -> None:
    """What several processes write at the same time is all there, each record whole."""
    reader = Reader()
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                journal = Journal(reader.path)
                for _ in range(500):
                    journal.note(RUNNING, Badge(7, number))
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    reader.update()
    reader.close()

    written = [(record.mark, record.badge, record.pid) for record in reader.records]
    assert sorted(written) == sorted(
        (RUNNING, Badge(7, number), pid) for number, pid in enumerate(children) for _ in range(500)
    )
