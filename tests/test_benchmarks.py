# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The benchmarks run, keep what they found, and publish nothing that means nothing."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "cases")]

import measure  # noqa: E402
import micro  # noqa: E402
import run  # noqa: E402
from suite import anatomy, driver, envs, tables  # noqa: E402
from suite.results import Record, Results, spread  # noqa: E402
from suite.rows import all_groups, brief, select  # noqa: E402
from suite.targets import all_bounds, all_targets  # noqa: E402

#: Why a row of ours may have no values: what it needs is not installed where the tests are, or it
#: asks how much memory workers have that are gone.
EXCUSES = ("No module named 'numpy'", "no worker outlives its job")


def smoke_run(rows: str, output: Path) -> dict[str, Any]:
    """Run rows as `make bench` does, but with this interpreter; the rows of the JSON."""
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "run.py"), "--here", "--quick"),
            *("--only", rows, "--output", str(output)),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((output / "results.json").read_text())["rows"]
    return found


def assert_measured(rows: dict[str, Any]) -> None:
    """Every row has numbers, or an excuse."""
    for name, row in rows.items():
        medians = [found["median"] for found in row["summary"].values()]
        excused = row["unavailable"] in EXCUSES

        assert not row["failures"], name
        assert excused or medians, f"{name}: {row['unavailable']}"
        assert all(median > 0 for median in medians), name


def test_a_row_runs_and_others_stay(tmp_path: Path) -> None:
    """`--only` runs what it names, and leaves what was measured before as it is."""
    first = smoke_run("noop/ours-fork", tmp_path)
    rows = smoke_run("large/ours-fork/bytearray-result", tmp_path)

    assert set(first) == {"noop/ours-fork"}
    assert set(rows) == {"noop/ours-fork", "large/ours-fork/bytearray-result"}
    assert rows["noop/ours-fork"] == first["noop/ours-fork"]
    assert_measured(rows)
    text = (tmp_path / "results.md").read_text()
    assert "### Jobs that do nothing" in text
    assert "### Large data on its way" in text
    assert "smoke run, whose figures mean nothing" in text


@pytest.mark.slow
def test_every_row_of_ours_runs(tmp_path: Path) -> None:
    """Whatever is measured of this package can be measured."""
    rows = smoke_run("ours-*,floor-*", tmp_path)

    assert {name.partition("/")[0] for name in rows} == {group.key for group in all_groups()}
    assert_measured(rows)


def test_rows_ask_for_what_measures_take() -> None:
    """No row has a parameter, or an operation, that its measure does not know."""
    for group in all_groups():
        for row in group.rows:
            assert (BENCHMARKS / "cases" / row.system.case).is_file(), row.id
            if row.measure == "operation":
                assert row.system.variant in micro.OPERATIONS, row.id
                continue
            signature = inspect.signature(measure.MEASURES[row.measure])
            signature.bind(None, **row.parameters)
            signature.bind(None, **brief(row))


def test_names_are_unique_and_targets_have_rows() -> None:
    """A row has one name, and every target compares metrics of rows that there are."""
    groups = all_groups()
    names = [row.id for group in groups for row in group.rows]
    metrics = {
        f"{row.id}:{metric.key}"
        for group in groups
        for row in group.rows
        for metric in group.metrics
    }

    assert len(names) == len(set(names))
    assert not [name for name in names if set(name) & set(", *")]
    assert {place for target in all_targets() for place in target[1:3]} <= metrics
    assert {f"{bound.row}:{bound.metric}" for bound in all_bounds()} <= metrics


def test_every_environment_has_its_requirements() -> None:
    """Each environment that a row needs has a file that pins what is in it."""
    for group in all_groups():
        for row in group.rows:
            assert (envs.REQUIREMENTS / f"{row.system.environment}.txt").is_file(), row.id


def test_rows_are_chosen_by_group_system_or_name() -> None:
    """`--only` takes groups, systems, single rows and patterns, and refuses what names nothing."""
    chosen = select(all_groups(), ["start", "noop/joblib", "done/peer-*/10", "floor-copy"])
    names = {row.id for group in chosen for row in group.rows}

    assert {"noop/joblib", "done/peer-fork/10", "large/floor-copy/1-MB-result"} < names
    assert {name.partition("/")[0] for name in names} == {"start", "noop", "done", "large"}
    with pytest.raises(LookupError, match="nonesuch"):
        select(all_groups(), ["noop", "nonesuch"])
    assert run.main(["--only", "nonesuch", "--list"]) == 2


def test_ratios_are_taken_round_by_round() -> None:
    """Rows of one session are compared within each round, leaving out a round that one lacks."""
    above: list[Any] = [{"x": 10.0}, {"x": 100.0}, None, {"x": 40.0}]
    below: list[Any] = [{"x": 5.0}, {"x": 10.0}, {"x": 1.0}, {"x": 10.0}]
    results = Results(rows={"a": Record("s", above), "b": Record("s", below)})
    ratio = results.ratio(("a", "x"), ("b", "x"))

    assert ratio is not None
    assert (ratio.median, ratio.number) == (4.0, 3)
    assert results.ratio(("a", "x"), ("none", "x")) is None


def test_spread_is_median_and_quartiles() -> None:
    """Of nothing there is no spread; else it is the median and the quartiles."""
    assert spread([]) is None
    assert spread([3.0]) == (3.0, 3.0, 3.0, 1)
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)


def test_a_case_that_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """What a case does not measure, by a fault of its own, is a failure and not a number."""
    died = driver.understood("", "Traceback\nKilled", -9)
    late = driver.understood('{"jobs_per_s": 1.0}', "", 1)
    said = driver.understood('noise\n{"failed": "ValueError: no"}', "its traceback", 0)

    assert died == {"failed": "exit status -9: Killed"}
    assert late == {"failed": "exit status 1 after it had measured"}
    assert said == {"failed": "ValueError: no"}
    assert "its traceback" in capsys.readouterr().err


def test_tables_say_why_a_cell_is_empty() -> None:
    """A row without values has no line of numbers, but one that says why."""
    group = next(group for group in all_groups() if group.key == "noop")
    results = Results(
        rows={
            "noop/ours-fork": Record("s", [{"jobs_per_s": 1234.5, "round_trip_us": 0.25}]),
            "noop/joblib": Record("s", unavailable="it is not there"),
            "noop/ppe-fork": Record("s", [None, {"jobs_per_s": 7.0}], failures=["it broke"]),
        }
    )
    text = tables.group_text(group, results)

    assert "| **jobserver**, fork | 1,234 | 0.25 |" in text
    assert "| `ProcessPoolExecutor`, fork | 7.0 |  |" in text
    assert "- joblib 1.6, `Parallel`: not available: it is not there." in text
    assert "- `ProcessPoolExecutor`, fork: 1 of 2 rounds failed: it broke." in text


def test_publishing_changes_what_is_between_the_marks(tmp_path: Path) -> None:
    """Tables go between the marks of the page; a page without them is left alone."""
    page = tmp_path / "page.md"
    page.write_text(f"above\n{tables.BEGIN}\nold\n{tables.END}\nbelow\n")
    tables.insert(page, "new\n")

    assert page.read_text() == f"above\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nbelow\n"
    page.write_text(f"{tables.END}\n{tables.BEGIN}\n")
    with pytest.raises(LookupError):
        tables.insert(page, "new")
    assert page.read_text() == f"{tables.END}\n{tables.BEGIN}\n"


def test_the_page_has_the_marks() -> None:
    """The documentation has a place for the tables."""
    text = run.PAGE.read_text()

    for begin, end in ((tables.BEGIN, tables.END), tables.ANATOMY):
        assert 0 < text.index(begin) < text.index(end)


def test_anatomy_counts_calls_by_who_made_them(tmp_path: Path) -> None:
    """A system call is that of its thread's process: the submitter, a zygote, or a worker."""
    traces = {
        10: "clone3({flags=CLONE_VM|CLONE_THREAD}, 88) = 11\nclone(flags=SIGCHLD) = 12\n",
        11: 'futex(0x1, FUTEX_WAKE, 1) = 1\nwrite(4, "x", 1) = 1\n--- SIGCHLD {} ---\n',
        12: 'execve("python", ["-c", "from jobserver._worker._zygote import main"]) = 0\n',
        13: 'write(1, "a", 1) = 1\nwrite(1, "b", 1) = 1\n+++ exited with 0 +++\n',
    }
    for thread, text in traces.items():
        (tmp_path / f"t.{thread}").write_text(text)

    assert anatomy.count_calls(tmp_path, 10) == {
        "submitter": {"clone3": 1, "clone": 1, "futex": 1, "write": 1},
        "zygote": {"execve": 1},
        "workers": {"write": 2},
    }


def test_anatomy_runs() -> None:
    """What a job costs is told for each kind that is asked for."""
    done = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "run.py"), "--anatomy", "--here"),
            *("--rounds", "1", "--only", "floor-pipes"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("| one job |")
    assert lines[2].startswith("| limit: warm processes")


def test_a_smoke_run_is_not_published(tmp_path: Path) -> None:
    """Figures that mean nothing stay out of the documentation."""
    before = run.PAGE.read_text()
    session = {
        "quick": True,
        "machine": {},
        "commit": "",
        "load_before": "0",
        "load_after": "0",
        "versions": {},
    }
    results = Results({"s": session}, {"noop/joblib": Record("s", [{"jobs_per_s": 1.0}])})
    results.save(tmp_path / "results.json")

    assert run.main(["--report", "--publish", "--output", str(tmp_path)]) == 2
    assert run.PAGE.read_text() == before
