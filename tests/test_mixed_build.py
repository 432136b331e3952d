# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The mixed build: never more compilers than slots, and the same bytes, whoever starts or dies."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from foreign import Tool, each_make
from helpers import (
    program_environment,
    run_program,
    session_members,
    started_program,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "mixed_build.py"

# The script finds its package beside itself; so do these tests.
sys.path.insert(0, str(EXAMPLES))

from mixed.builders import BuildError, Site, build  # noqa: E402
from mixed.census import Census  # noqa: E402
from mixed.fetch import FetchError, fetch, pinned, unpack, unpack_part  # noqa: E402
from mixed.foreman import WorkError, open_pool, run, workplace  # noqa: E402
from mixed.parts import PARTS, Part  # noqa: E402
from mixed.show import Progress, as_json, as_table  # noqa: E402
from mixed.tools import ToolError, find_ninja, find_tools  # noqa: E402

from jobserver import Jobserver  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRESS = re.compile(r"building: [ \d]\d of 22 objects, \d+\.\d s")
#: Seconds for a build that takes three on an idle machine.
LONG = 240.0
PLAIN = {"zstd": f"make {find_tools().make.version}", "xxhash": "nested Python jobs"}


class Done(NamedTuple):
    """A whole build."""

    work: Path
    found: dict[str, Any]
    table: list[str]


@pytest.fixture(scope="session")
def sdists() -> Path:
    """The sources, downloaded once for all interpreters and for `make mixed`."""
    folder = ROOT / "build" / "sdists"
    try:
        fetch(folder)
    except FetchError as error:
        if "CI" in os.environ or "No matching distribution" not in str(error):
            raise
        pytest.skip(f"no network: {error}")
    return folder


@pytest.fixture(scope="module")
def plain(sdists: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A build on two slots of its own."""
    work = tmp_path_factory.mktemp("mixed") / "work"
    with workplace(work) as root:
        unpack(sdists, root / "sources")
        pool = open_pool("fork", 2, root)
        done = run(pool, root, find_tools(), kill_make=False, on_objects=lambda _: None)
    return Done(work, as_json(done), list(as_table(done)))


def script(work: Path, sdists: Path) -> list[str]:
    """The script and where it works."""
    return [str(SCRIPT), "--work", str(work), "--sdists", str(sdists)]


def odd(stderr: str) -> list[str]:
    """What is not about progress."""
    return [line for line in stderr.splitlines() if not PROGRESS.fullmatch(line)]


# Whole builds


def test_two_slots_are_enough_for_all_builders_and_none_has_more(plain: Done) -> None:
    """Three builders at work together run two compilers at a time, and give all tokens back."""
    found = plain.found
    parts = found["parts"]

    assert (found["slots"], found["pool"]) == (2, "own")
    assert found["peak_compilers"] == 2
    assert found["tokens_free"] == 2
    assert {name: part["objects"] for name, part in parts.items()} == {
        "zstd": 12,
        "lz4": 4,
        "xxhash": 6,
    }
    assert {part["attempts"] for part in parts.values()} == {1}
    ninja = find_ninja()
    how = f"ninja {ninja.version}" if ninja else f"{PLAIN['zstd']} (no ninja)"
    assert {name: part["how"] for name, part in parts.items()} == {**PLAIN, "lz4": how}


def test_artefacts_are_as_reported(plain: Done) -> None:
    """The zip has each library and its symbols, with the hashes that the report has."""
    found = plain.found
    path = plain.work / "tree" / "mixed.zip"

    assert hashlib.sha256(path.read_bytes()).hexdigest() == found["zip"]["sha256"]
    with zipfile.ZipFile(path) as archive:
        hashes = {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if name != "SHA256SUMS"
        }
        lines = archive.read("SHA256SUMS").decode().splitlines()
        sums = {line.split("  ")[1]: line.split("  ")[0] for line in lines}
        symbols = {
            part.name: archive.read(f"lib{part.name}.symbols").decode().split("\n")
            for part in PARTS
        }
    assert hashes == sums
    assert hashes == {name: one["sha256"] for name, one in found["artefacts"].items()}
    assert len(hashes) == 6
    assert "T ZSTD_decompress" in symbols["zstd"]
    assert "T LZ4_compress_default" in symbols["lz4"]
    assert "T XXH3_64bits" in symbols["xxhash"]


USES_ALL = """\
#include <lz4.h>
#include <xxhash.h>
#include <zstd.h>
int main(void)
{
    return LZ4_versionNumber() != LZ4_VERSION_NUMBER
        || XXH_versionNumber() != XXH_VERSION_NUMBER
        || ZSTD_versionNumber() != ZSTD_VERSION_NUMBER;
}
"""


def test_libraries_work(plain: Done, tmp_path: Path) -> None:
    """A program with all three libraries runs, and their versions are those of the sources."""
    (tmp_path / "all.c").write_text(USES_ALL)
    tree = plain.work / "tree"
    # The last one first: lz4 comes with a header of an older xxhash.
    includes = [f"-I{tree}/sources/{part.name}" for part in reversed(PARTS)]
    libraries = [f"{tree}/artefacts/{part.archive}" for part in PARTS]
    command = [find_tools().cc, *includes, "-o", "all", "all.c", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True)

    assert subprocess.run(["./all"], cwd=tmp_path).returncode == 0


def test_one_slot(plain: Done, sdists: Path, tmp_path: Path) -> None:
    """One slot is enough, for one compiler at a time, and gives the same zip."""
    done = run_program([*script(tmp_path / "work", sdists), "--slots", "1"], timeout=LONG)

    assert (done.returncode, odd(done.stderr)) == (0, [])
    assert f" {plain.found['zip']['sha256']}\n" in done.stdout
    assert "\nat most 1 compiler at once, " in done.stdout
    assert "\n1 slot of its own (fork), 1 token free at the end\n" in done.stdout


@pytest.mark.contract("K1", "K6", "K7")
def test_killed_make_costs_no_slot(plain: Done, sdists: Path, tmp_path: Path) -> None:
    """After SIGKILL of a make in mid-build the rest has both slots, and no token is missing."""
    tool = ["-m", "jobserver", "run", "-j2", "--check", "--", sys.executable]
    more = ["--kill-make", "--context", "forkserver", "--json"]
    done = run_program([*tool, *script(tmp_path / "work", sdists), *more], timeout=LONG)

    assert (done.returncode, odd(done.stderr)) == (0, [])
    found = json.loads(done.stdout)
    assert found["pool"] == "outer"
    assert 0 < found["killed"]["objects"] < 12
    assert 0 < found["killed"]["compilers"] <= 2
    assert found["parts"]["zstd"]["attempts"] == 2
    assert (found["peak_compilers"], found["killed"]["peak_after"]) == (2, 2)
    assert found["tokens_free"] == 1
    assert found["zip"] == plain.found["zip"]


CLIENT = """\
all: mixed other1 other2
mixed:
\t+@{python} {script} --context spawn --json > report
other1 other2:
\t@{cc} -O0 -c -o $@.o lz4/lz4hc.c
.PHONY: all mixed other1 other2
"""


@pytest.mark.contract("K1", "K4", "K6")
@each_make()
def test_a_make_is_the_server(plain: Done, sdists: Path, tmp_path: Path, make: Tool) -> None:
    """Started by make -j2 it is content with make's slots, and make has them all at the end."""
    lz4 = next(part for part in PARTS if part.name == "lz4")
    unpack_part(sdists / f"{lz4.sdist}.tar.gz", lz4, tmp_path / "lz4")
    text = CLIENT.format(
        python=sys.executable,
        script=" ".join(script(tmp_path / "work", sdists)),
        cc=find_tools().cc,
    )
    (tmp_path / "Makefile").write_text(text)
    census = Census(tmp_path, find_tools().cc)
    peak = 0
    command = [make.path, "-j2", "--no-print-directory"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=program_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(census.count().values()))
            time.sleep(0.01)
        assert process.stdout is not None
        said = process.stdout.read()

    # A token too many or too few would make it say so.
    assert (process.returncode, odd(said)) == (0, [])
    assert peak == 2
    found = json.loads((tmp_path / "report").read_text())
    assert (found["pool"], found["slots"]) == ("outer", 2)
    assert found["peak_compilers"] <= 2
    assert found["zip"] == plain.found["zip"]


def test_interruption_leaves_nobody(sdists: Path, tmp_path: Path) -> None:
    """Ctrl-C ends it with status 130, without a word, and no builder or compiler goes on."""
    census = Census(tmp_path, find_tools().cc)
    with started_program(script(tmp_path / "work", sdists)) as process:
        wait_until(lambda: sum(census.count().values()), "a compiler")
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)

        assert (process.returncode, stdout, odd(stderr)) == (130, "", [])
        wait_until(lambda: not session_members(process.pid), "the builders to be gone")
    assert list(census.inhabitants()) == []


# Parts of it


SMALL = Part("small", "small-1", "c", ("one.c", "two.c"), (".",), (), "ninja")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A place with two small sources, and no ninja."""
    sources = tmp_path / "sources" / "small"
    sources.mkdir(parents=True)
    (sources / "one.c").write_text("int one(void) { return 1; }\n")
    (sources / "two.c").write_text("int two(void) { return 2; }\n")
    with Jobserver("fork", 2, lend=True) as js:
        yield Site(js, tmp_path, find_tools()._replace(ninja=None))


def test_without_ninja_make_builds(site: Site) -> None:
    """Where no ninja shares slots, make builds what ninja was to, and the report says so."""
    built = build(site, SMALL)

    assert built.how == f"{PLAIN['zstd']} (no ninja)"
    assert built.objects == 2
    assert (site.room(SMALL) / "libsmall.a").exists()


@pytest.mark.parametrize("builder", ["make", "jobs"])
def test_what_cannot_be_compiled_is_named(site: Site, builder: str) -> None:
    """A source that is wrong ends the build with what the compiler or builder says last."""
    (site.root / "sources" / "small" / "two.c").write_text("int two(void) {\n")

    with pytest.raises(BuildError, match=r"on small: .+"):
        site.jobserver(build, site, SMALL._replace(builder=builder)).result()


def test_census_counts_compilations(tmp_path: Path) -> None:
    """A driver and its compiler are one, and those outside of the folder are none."""
    room = tmp_path / "rooms" / "small"
    room.mkdir(parents=True)
    tools = find_tools()
    census = Census(tmp_path / "rooms", tools.cc)
    command = [tools.cc, "-x", "c", "-S", "-o", "/dev/null", "-"]
    started = [
        subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for cwd in (room, room, tmp_path)
    ]
    try:
        # They wait for their input, so they are all there at last.
        wait_until(lambda: len(list(census.inhabitants())) >= 4, "two drivers and two compilers")
        assert census.count() == {"small": 2}
        census.evict("small")
        assert census.count() == {}
        assert started[2].poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_no_folder_is_emptied_that_is_not_its_own(tmp_path: Path) -> None:
    """It works in a new or empty folder, or in its own, one run at a time."""
    (tmp_path / "tree").mkdir()
    with pytest.raises(WorkError, match="is not empty"), workplace(tmp_path):
        pass
    with workplace(tmp_path / "new") as root:
        (root / "rest").touch()
        with pytest.raises(WorkError, match="another run"), workplace(tmp_path / "new"):
            pass
    with workplace(tmp_path / "new") as root:
        assert list(root.iterdir()) == []


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, binutils or make it says which is missing."""
    tools = find_tools()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="neither cc nor gcc"):
        find_tools()
    (tmp_path / "gcc").symlink_to("/bin/sh")
    with pytest.raises(ToolError, match="no binutils"):
        find_tools()
    for name in ("ar", "nm"):
        (tmp_path / name).symlink_to(tools.nm)
    with pytest.raises(ToolError, match="no GNU make"):
        find_tools()


def test_old_ninja_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ninja that knows nothing of jobservers is not taken."""
    for name, version in (("old", "1.11.1"), ("kitware", "1.11.1.git.kitware.jobserver-1")):
        (tmp_path / name).mkdir()
        script = tmp_path / name / "ninja"
        script.write_text(f"#!/bin/sh\necho {version}\n")
        script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "old"))
    monkeypatch.delenv("JOBSERVER_NINJAS", raising=False)
    assert find_ninja() is None

    kitware = str(tmp_path / "kitware" / "ninja")
    monkeypatch.setenv("JOBSERVER_NINJAS", kitware)
    assert find_ninja() == (kitware, "1.11.1")


# Sources


def offline(monkeypatch: pytest.MonkeyPatch, links: Path | None = None) -> None:
    """Let pip find nothing but what is in a folder."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links or ""))


def test_download_runs_nothing_of_the_sources(
    sdists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sdists come as they are, by pip alone: no backend is installed, no setup.py is run."""
    offline(monkeypatch, sdists)
    fetch(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {*pinned(), "lock"}


def test_other_sources_are_refused(
    sdists: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file with another hash is neither used nor kept, wherever it comes from."""
    links, folder = tmp_path / "links", tmp_path / "sdists"
    for place in (links, folder):
        place.mkdir()
        for name in pinned():
            (place / name).write_bytes((sdists / name).read_bytes() + b"\0")
    offline(monkeypatch, links)
    with pytest.raises(FetchError, match=r"DO NOT MATCH THE HASHES .* lz4==4"):
        fetch(folder)


def test_no_network_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be downloaded, the message says what is needed, and for how long."""
    offline(monkeypatch)
    done = run_program(script(tmp_path / "work", tmp_path / "sdists"))

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "mixed_build.py: error: pip cannot download the sources:"
        f" No matching distribution found for {next(iter(pinned())).rpartition('-')[0]}==4.4.5\n"
        "They are needed once, from the index that pip is configured for; later runs do without"
        " a network.\n"
    )


def test_unpacking_stays_in_its_folder(tmp_path: Path) -> None:
    """Of an sdist only regular C files of the part are written, below the part's folder."""
    sdist, folder = tmp_path / "small-1.tar.gz", tmp_path / "deep" / "small"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("one.c", "../two.c", "../../../escaped.c", "setup.py", "sub/one.h"):
            member = tarfile.TarInfo(f"small-1/c/{name}")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"\n"))
        for name in ("/escaped.c", "small-1/../escaped.c"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("small-1/c/two.c")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)

    with pytest.raises(FetchError, match=r"small-1.tar.gz has no two\.c$"):
        unpack_part(sdist, SMALL, folder)
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.is_dir()}
    assert written == {Path("small-1.tar.gz"), Path("deep/small/one.c")}


# What is shown


def test_page_shows_the_table(plain: Done) -> None:
    """The page on builders shows what the build prints, but for the numbers."""
    page = (ROOT / "docs" / "builders.md").read_text()
    section = page.partition("## A whole mixed build\n")[2]
    shown = section.partition("```text\n")[2].partition("```")[0]
    printed = "\n".join(plain.table).replace(f"{PLAIN['zstd']} (no ninja)", "ninja 1.13")

    assert outline(shown) == outline(printed)


def outline(text: str) -> list[str]:
    """The words of each line."""
    words = re.sub(r"[0-9a-f]{64}|\d[\d.,]*", "", text)
    return [" ".join(line.split()) for line in words.strip().split("\n")]


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--slots", "0"], "0 is less than 1"), (["--context", "thread"], "invalid choice")],
)
def test_bad_arguments(more: list[str], words: str) -> None:
    """What is wrong with the command line is said in one line, with status 2."""
    done = run_program([str(SCRIPT), *more])

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("mixed_build.py: error: ")
    assert words in line


@pytest.mark.parametrize("live", [True, False])
def test_progress(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one line changes in place and is gone at the end; elsewhere there are five."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: live)
    with Progress(stream) as show:
        for objects in range(23):
            show(objects)
    shown = stream.getvalue()

    if live:
        first, *_, last = shown.split("\r")
        assert (first, last) == ("", "\x1b[K")
        assert PROGRESS.fullmatch(shown.split("\r")[1].replace("\x1b[K", ""))
    else:
        counts = [int(line.split()[1]) for line in shown.splitlines()]
        assert counts == [0, 6, 11, 17, 22]
    assert ("\n" in shown) is not live
