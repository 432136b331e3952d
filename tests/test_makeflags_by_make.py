# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What we read in MAKEFLAGS, and write into them, against what make itself makes of it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile

import pytest
from foreign import Tool, each_make
from helpers import program_environment
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobserver._slots._announce import compose
from jobserver._slots._makeflags import open_outer, read_options, split_flags
from jobserver.makeflags import MakeflagsError

# Written to a descriptor of its own, as make prints recipes and messages to the others.
MAKEFILE = 'all:\n\t+@printenv MAKEFLAGS >flags; printf %s "$$V" >v; printf %s "$$W" >w\n'
TRICKY = st.sampled_from(
    [" ", "\\", "$$", "--jobserver-auth=9,9", " -- ", "n", "=", "'", "a", "-j7", "\t", "\\\\", "#"]
)
BLANKS = " \t"
VALUES = st.lists(TRICKY, max_size=6).map("".join)
FLAGS = st.lists(
    st.sampled_from(["-k", "-s", "-i", "-n", "-l2.5", "--no-print-directory", "--trace"]),
    unique=True,
    max_size=4,
)


def seen_by(make: Tool, arguments: list[str], makeflags: str | None) -> tuple[str, str, str]:
    """MAKEFLAGS, $V and $W as a recipe gets them."""
    env = program_environment()
    if makeflags is not None:
        env["MAKEFLAGS"] = makeflags
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "Makefile"), "w") as stream:
            stream.write(MAKEFILE)
        done = subprocess.run(
            [make.path, *arguments], cwd=directory, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

        def read(name: str) -> str:
            with open(os.path.join(directory, name)) as stream:
                return stream.read()

        return read("flags").rstrip("\n"), read("v"), read("w")


@each_make()
@settings(max_examples=12, deadline=None)
@given(flags=FLAGS, v=VALUES, w=VALUES, jobs=st.integers(2, 40))
def test_make_is_read_as_it_means(make: Tool, flags: list[str], v: str, w: str, jobs: int) -> None:
    """We find the pool, -jN, a dry run and the variables in what make writes, whatever they are."""
    makeflags, _, _ = seen_by(make, [f"-j{jobs}", *flags, f"V={v}", f"W={w}"], None)

    words = split_flags(makeflags)
    auth, slots = read_options(words)
    assert slots == jobs
    assert auth is not None
    assert re.fullmatch(r"\d+,\d+|fifo:/.*GMfifo\d+", auth)
    assert ("n" in words[0]) is ("-n" in flags)
    # Make strips blanks at the beginning of a value.
    expected = [f"V={v.lstrip(BLANKS)}", f"W={w.lstrip(BLANKS)}"]
    assert sorted(words[words.index("--") + 1 :]) == expected


@each_make()
@settings(max_examples=12, deadline=None)
@given(flags=FLAGS, v=VALUES, w=VALUES)
def test_make_reads_what_we_write(make: Tool, flags: list[str], v: str, w: str) -> None:
    """A make below us has the flags and variables that the make above us had, and our pool."""
    above, value, other = seen_by(make, ["-j3", *flags, f"V={v}", f"W={w}"], None)
    reader, writer = os.pipe()
    try:
        for fd in (reader, writer):
            os.set_inheritable(fd, True)
        ours = compose(above, "universal", f"{reader},{writer}", "/dev/shm/pool", 3)
        below = compose_and_see(make, ours, (reader, writer))
    finally:
        os.close(reader)
        os.close(writer)

    makeflags, value_below, other_below = below
    assert (value_below, other_below) == (value, other)
    assert read_options(split_flags(makeflags))[0] == f"{reader},{writer}"
    assert makeflags.endswith("--jobserver-auth=fifo:/dev/shm/pool") or (
        "JOBSERVER_FIFO=x\\ --jobserver-auth=fifo:/dev/shm/pool" in makeflags
    )
    assert set(split_flags(makeflags)[0]) == set(split_flags(above)[0])


def compose_and_see(make: Tool, makeflags: str, fds: tuple[int, int]) -> tuple[str, str, str]:
    """What a make with these MAKEFLAGS hands on."""
    env = {**program_environment(), "MAKEFLAGS": makeflags}
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "Makefile"), "w") as stream:
            stream.write(MAKEFILE)
        done = subprocess.run(
            [make.path], cwd=directory, env=env, capture_output=True, text=True, pass_fds=fds
        )
        assert done.returncode == 0, done.stderr
        assert "jobserver" not in done.stderr
        texts = []
        for name in ("flags", "v", "w"):
            with open(os.path.join(directory, name)) as stream:
                texts.append(stream.read())
        return texts[0].rstrip("\n"), texts[1], texts[2]


# What people write into MAKEFLAGS that make never would: what it hands on says how it reads that.
ODD = [
    " k",
    " n",
    "n -j4",
    "kj4",
    "-j4",
    "-j 4",
    "\t-k --jobs 4",
    "--jobs=4 -k",
    "\\-j4 all",
    "\\-- V=1",
    "-k -\\- V=-n",
    " -j4 \\-\\- V=--",
    "V=1 -j4",
    " -j4 -- V=a\\\\\\ b\\",
]


@each_make()
@pytest.mark.parametrize("odd", ODD)
def test_written_by_hand(make: Tool, odd: str) -> None:
    """Make reads what we write as it reads what we have found, but for the jobs."""
    above, value, other = seen_by(make, [], odd)
    reader, writer = os.pipe()
    try:
        ours = compose(odd, "pipe", f"{reader},{writer}", "/dev/shm/pool", 3)
        below, value_below, other_below = compose_and_see(make, ours, (reader, writer))
    finally:
        os.close(reader)
        os.close(writer)

    assert (value_below, other_below) == (value, other)
    words, words_below = split_flags(above), split_flags(below)
    assert set(words_below[0]) == set(words[0])
    assert ("n" in split_flags(odd)[0]) is ("n" in words[0])
    assert read_options(words_below)[1] == 3


PIECES = st.one_of(
    st.sampled_from(
        [
            " ",
            "\\",
            "$",
            "--",
            "-j",
            "3",
            ",",
            "fifo:",
            "--jobserver-auth=",
            "--jobserver-fds=",
            "-2",
        ]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3),
)


@settings(max_examples=300, deadline=None)
@example("\\--")
@example("-\\- V=--jobserver-auth=9,9")
@example("\\-j3 \\--jobserver-auth=9,9")
@example(" -j 3")
@example("k\\")
@example("-j\N{SUPERSCRIPT TWO}")
@given(st.lists(PIECES, max_size=12).map("".join))
def test_garbage_is_refused_by_type(makeflags: str) -> None:
    """Whatever MAKEFLAGS say leads to a pool or a MakeflagsError, and can be written anew."""
    before = len(os.listdir("/proc/self/fd"))
    with contextlib.suppress(MakeflagsError):
        os.close(open_outer(makeflags).fd)
    assert len(os.listdir("/proc/self/fd")) == before

    auth, slots = read_options(split_flags(compose(makeflags, "pipe", "7,8", "/p", 5)))
    assert (auth, slots) == ("7,8", 5)
