# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Joining an outer pool: what MAKEFLAGS says, and each way in which it can be wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Callable

import pytest
from foreign import Tool, each_make, each_make_and_style
from helpers import PATIENCE, add, free_slots, identity, program_environment

import jobserver.makeflags
from jobserver import Blocked, Jobserver
from jobserver.makeflags import (
    BadAuth,
    CannotOpenFifo,
    DescriptorsClosed,
    DescriptorsOfOthers,
    DryRun,
    MakeflagsError,
    NoJobserver,
    NoMakeflags,
    NoPoolOffered,
    NotAFifo,
    PoolDisabled,
    PoolUnusable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers import Gate


class Outer:
    """A pool as a make would have made it."""

    def __init__(self, path: Path, tokens: bytes) -> None:
        os.mkfifo(path)
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self.reader = os.open(path, os.O_RDONLY)
        self.writer = os.open(path, os.O_WRONLY)
        os.write(self.fd, tokens)

    @property
    def pair(self) -> str:
        """The descriptors as make names them."""
        return f"{self.reader},{self.writer}"

    def tokens(self) -> list[int]:
        """Take all tokens out."""
        try:
            return sorted(os.read(self.fd, 100))
        except BlockingIOError:
            return []

    def close(self) -> None:
        """Close the pool."""
        for fd in (self.fd, self.reader, self.writer):
            os.close(fd)


@pytest.fixture
def outer(tmp_path: Path) -> Iterator[Outer]:
    """A pool of three slots: two tokens, and the implicit one."""
    pool = Outer(tmp_path / "pool", b"ab")
    yield pool
    pool.close()


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what the environment says."""
    for name in ("MAKEFLAGS", "CARGO_MAKEFLAGS"):
        monkeypatch.delenv(name, raising=False)

    def set_flags(makeflags: str, name: str = "MAKEFLAGS") -> None:
        monkeypatch.setenv(name, makeflags)

    return set_flags


WRONG: list[tuple[str, type[MakeflagsError]]] = [
    ("", NoMakeflags),
    ("   ", NoMakeflags),
    ("k", NoJobserver),
    (" -j", NoJobserver),
    (" -j1", NoJobserver),
    (" -j3 -- A=--jobserver-auth=3,4", NoJobserver),
    (" -j3 -- --jobserver-auth=3,4", NoJobserver),
    ("kns -j3 --jobserver-auth={pair}", DryRun),
    (" -j3 --jobserver-auth={pair} --jobserver-auth=-2,-2", PoolDisabled),
    (" -j3 --jobserver-auth=-1,{writer}", PoolDisabled),
    (" -j3 --jobserver-auth=", BadAuth),
    (" -j3 --jobserver-auth=3", BadAuth),
    (" -j3 --jobserver-auth=3,4,5", BadAuth),
    (" -j3 --jobserver-auth=+3,4", BadAuth),
    (" -j3 --jobserver-auth=3,4_0", BadAuth),
    (" -j3 --jobserver-auth=gmake_semaphore_17", BadAuth),
    (" -j3 --jobserver-auth=fifo:{path}.gone", CannotOpenFifo),
    (" -j3 --jobserver-auth=fifo:", CannotOpenFifo),
    (" -j3 --jobserver-auth=fifo:/dev/null", NotAFifo),
    (" -j3 --jobserver-auth=1000000,1000001", DescriptorsClosed),
    (" -j3 --jobserver-auth=99999999999,99999999999", DescriptorsClosed),
    (" -j3 --jobserver-auth={reader},{file}", DescriptorsOfOthers),
    (" -j3 --jobserver-auth={file},{file}", DescriptorsOfOthers),
    (" -j3 --jobserver-auth={reader},{otherpipe}", DescriptorsOfOthers),
]


@pytest.mark.contract("J6", "K1", "K2")
@pytest.mark.parametrize(("flags", "kind"), WRONG, ids=lambda value: str(value)[-40:])
def test_each_way_to_be_wrong(
    outer: Outer, say: Callable[..., None], flags: str, kind: type[MakeflagsError]
) -> None:
    """from_env tells what is wrong by type; Jobserver() goes on, and warns if a pool is offered."""
    file = os.open(os.devnull, os.O_RDWR)
    other = os.pipe()
    try:
        say(
            flags.format(
                pair=outer.pair,
                reader=outer.reader,
                writer=outer.writer,
                path=outer.path,
                file=file,
                otherpipe=other[1],
            )
        )
        with pytest.raises(kind) as caught:
            Jobserver.from_env("fork")
        assert type(caught.value) is kind
        expected = (
            pytest.warns(RuntimeWarning, match="cannot be used")
            if kind in PoolUnusable.__subclasses__()
            else contextlib.nullcontext()
        )
        with expected, Jobserver("fork") as js:
            assert js(add, 1, 2).result(PATIENCE) == 3
        assert outer.tokens() == [*b"ab"]
    finally:
        for fd in (file, *other):
            os.close(fd)


def test_every_error_is_tried() -> None:
    """Each exception of the module is raised by some environment above, and each is documented."""
    kinds = {getattr(jobserver.makeflags, name) for name in jobserver.makeflags.__all__}

    assert {kind for _, kind in WRONG} == kinds - {MakeflagsError, NoPoolOffered, PoolUnusable}
    assert all(issubclass(kind, MakeflagsError) and kind.__doc__ for kind in kinds)


RIGHT = [
    "ks -j3 -l2.5 --jobserver-auth=fifo:{path} -- FOO=n",
    " -j3 --jobserver-auth={pair}",
    " --jobserver-fds={pair} -j",
    "-j --jobserver-fds={pair} --jobserver-auth={pair}",
    " -j3 --jobserver-auth=-2,-2 --jobserver-auth={pair}",
    " -j3 --jobserver-auth=fifo:/dev/null --jobserver-fds={pair}",
    " -j3 --jobserver-auth=fifo:{path} -- FOO=x\\ --jobserver-auth=-2,-2",
    " -j3 --jobserver-auth=fifo:{path} -- --jobserver-auth=-2,-2",
]


@pytest.mark.contract("J6")
@pytest.mark.parametrize("flags", RIGHT)
def test_joined_as_make_would(
    outer: Outer, say: Callable[..., None], gate: Gate, flags: str
) -> None:
    """The pool that make itself would take is joined, with its tokens and the implicit slot."""
    say(flags.format(pair=outer.pair, path=outer.path))

    with Jobserver.from_env("fork") as js:
        assert free_slots(js, gate) == 3

    assert outer.tokens() == [*b"ab"]
    assert os.get_blocking(outer.reader)


@pytest.mark.contract("J6")
def test_blank_in_the_path(tmp_path: Path, say: Callable[..., None], gate: Gate) -> None:
    """Make quotes a blank in the path of its FIFO with a backslash."""
    (tmp_path / "a b").mkdir()
    pool = Outer(tmp_path / "a b" / "c$d\\e", b"x")
    try:
        quoted = str(pool.path).replace("\\", "\\\\").replace(" ", "\\ ").replace("$", "$$")
        say(f" -j2 --jobserver-auth=fifo:{quoted}")

        with Jobserver.from_env("fork") as js:
            assert free_slots(js, gate) == 2
    finally:
        pool.close()


@pytest.mark.contract("J6")
def test_cargo_has_a_variable_of_its_own(
    outer: Outer, say: Callable[..., None], gate: Gate
) -> None:
    """What cargo tells its build scripts counts where MAKEFLAGS offers nothing."""
    say(f"-j --jobserver-fds={outer.pair} --jobserver-auth={outer.pair}", "CARGO_MAKEFLAGS")
    with Jobserver.from_env("fork") as js:
        assert free_slots(js, gate) == 3

    say(" -j3 --jobserver-auth=-2,-2")
    with pytest.raises(PoolDisabled):
        Jobserver.from_env()


@pytest.mark.contract("J6")
def test_explicit_slots_ignore_the_pool(outer: Outer, say: Callable[..., None], gate: Gate) -> None:
    """Jobserver(slots=...) takes no part in the outer pool, and says nothing of a broken one."""
    say(" -j3 --jobserver-auth=17")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Jobserver("fork", 1) as js:
            assert free_slots(js, gate) == 1


@pytest.mark.contract("J6", "J9", "K1")
def test_from_env_takes_the_other_arguments(
    method: str, outer: Outer, say: Callable[..., None]
) -> None:
    """from_env has the constructor's arguments but slots, in every start method."""
    say(f" -j3 --jobserver-auth={outer.pair}")

    with Jobserver.from_env(method, env={"JOBSERVER_T": "1"}, lend=True) as js:
        assert js.context.get_start_method() == method
        assert js(os.getenv, "JOBSERVER_T").result(PATIENCE) == "1"
        assert js._lend
    with pytest.raises(TypeError):
        Jobserver.from_env("fork", 3)  # type: ignore[arg-type, call-arg]

    assert outer.tokens() == [*b"ab"]


@pytest.mark.contract("J6")
def test_idle_tokens_are_not_kept(outer: Outer, say: Callable[..., None]) -> None:
    """A token goes back as soon as its job has ended; the implicit slot is used first."""
    say(f" -j3 --jobserver-auth={outer.pair}")

    with Jobserver.from_env("fork") as js:
        one = js(identity, 1)
        assert outer.tokens() == [*b"ab"]
        os.write(outer.fd, b"ab")
        two = js(identity, 2)
        assert (one.result(PATIENCE), two.result(PATIENCE)) == (1, 2)
        assert outer.tokens() == [*b"ab"]
        js(identity, 3).result(PATIENCE)  # on the implicit slot
        busy = js(signal.pause)
        with pytest.raises(Blocked):
            js.submit(identity, args=(4,), timeout=0)
        busy.wait(PATIENCE, signal=9)


PROGRAM = """\
import signal
from jobserver import Jobserver, Blocked
from jobserver.makeflags import MakeflagsError
try:
    js = Jobserver.from_env("fork")
except MakeflagsError as error:
    print(type(error).__name__)
else:
    with js:
        futures = []
        try:
            while len(futures) < 20:
                futures.append(js.submit(signal.pause, timeout=0))
        except Blocked:
            pass
        print(len(futures))
        for future in futures:
            future.wait(signal=9)
"""


def run_make(make: Tool, directory: Path, makefile: str, *arguments: str) -> tuple[str, str]:
    """Run make; what it and its recipes have printed."""
    (directory / "program.py").write_text(PROGRAM)
    (directory / "Makefile").write_text(makefile)
    done = subprocess.run(
        [make.path, "--no-print-directory", *arguments],
        cwd=directory,
        env={**program_environment(), "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.contract("J6")
@each_make()
def test_under_the_real_make(make: Tool, tmp_path: Path) -> None:
    """Under make -j4 there are four slots, and make gets all its tokens back."""
    out, err = run_make(make, tmp_path, "all:\n\t+@$(PYTHON) program.py\n", "-j4")

    assert (out, err) == ("4\n", "")


@pytest.mark.contract("J6")
@each_make()
@pytest.mark.parametrize(
    ("recipe", "arguments", "kind"),
    [
        ("+", ["-j1"], "NoJobserver"),
        ("+", [], "NoJobserver"),
        ("+", ["-j"], "NoJobserver"),
        ("+", ["-j3", "-n"], "DryRun"),
    ],
)
def test_what_the_real_make_does_not_offer(
    make: Tool, tmp_path: Path, recipe: str, arguments: list[str], kind: str
) -> None:
    """Without -jN, or in a dry run, from_env says what is missing."""
    makefile = f"all:\n\t{recipe}@$(PYTHON) program.py\n"

    out, _ = run_make(make, tmp_path, makefile, *arguments)

    assert out.splitlines()[-1] == kind


@pytest.mark.contract("J6")
@each_make()
def test_recipe_without_plus(make: Tool, tmp_path: Path) -> None:
    """A recipe without + gets no descriptors: from_env says so; a FIFO it may use all the same."""
    style = ["--jobserver-style=pipe"] if make.version >= (4, 4) else []
    makefile = "all:\n\t@$(PYTHON) program.py\n"

    out, _ = run_make(make, tmp_path, makefile, "-j3", *style)

    assert out == ("PoolDisabled\n" if style else "DescriptorsClosed\n")
    if style:
        assert run_make(make, tmp_path, makefile, "-j3")[0] == "3\n"


KILLED = """\
import os, signal, sys
from jobserver import Jobserver
import helpers, pathlib
js = Jobserver.from_env(sys.argv[1])
gate = helpers.Gate(pathlib.Path(sys.argv[2]))
def nested():
    for _ in range(2):
        js(gate.enter)
    signal.pause()
if __name__ == "__main__" and sys.argv[3] == "nested":
    futures = [js(nested) for _ in range(2)]
    gate.await_entered(4)
    for future in futures:
        future._send(signal.SIGKILL)
    sys.exit("Killed")
if __name__ == "__main__":
    futures = [js(gate.enter) for _ in range(4)]
    gate.await_entered(4)
    if sys.argv[3] == "all":
        for future in futures:
            future._send(signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.contract("J6")
@each_make_and_style()
@pytest.mark.parametrize("who", ["all", "root", "nested"])
def test_killed_below_make(
    make: Tool, style: list[str], who: str, tmp_path: Path, gate: Gate
) -> None:
    """After a SIGKILL of a program below make, or of its submitting jobs, no token is missing."""
    (tmp_path / "killed.py").write_text(KILLED)
    makefile = (
        f"all:\n\t+@$(PYTHON) killed.py fork {gate.directory} {who} || mkdir {gate.directory}/open"
    )

    _, err = run_make(make, tmp_path, makefile + "\n", "-j6", *style)

    assert "INTERNAL" not in err
    assert "Killed" in err
