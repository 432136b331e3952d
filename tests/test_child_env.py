# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Handing slots on to make, ninja, cargo and gcc: child_env and popen_kwargs."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Callable

import pytest
from foreign import Tool, build, each_make, each_make_and_style, each_ninja, lay_out, needs
from helpers import (
    PATIENCE,
    Gate,
    fail,
    identity,
    nothing,
    open_fds,
    pid,
    program_environment,
    wait_until,
)
from marks import by_method

from jobserver import Jobserver, JobserverExecutor
from jobserver._slots._announce import compose
from jobserver._slots._makeflags import open_outer, read_options, split_flags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without any make."""
    for name in ("MAKEFLAGS", "CARGO_MAKEFLAGS", "MFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def js(clean: pytest.MonkeyPatch) -> Iterator[Jobserver]:
    """A Jobserver with three slots."""
    with Jobserver("fork", 3) as jobserver:
        yield jobserver


def free(js: Jobserver) -> int:
    """How many tokens are free."""
    return js._shared.slots.free()


# What the string says


@pytest.mark.contract("K3")
@pytest.mark.parametrize("style", ["auto", "universal", "fifo", "pipe"])
def test_offer_leads_to_the_pool(js: Jobserver, style: str) -> None:
    """Whichever way a tool reads MAKEFLAGS, it finds the pool's own pipe."""
    pool = os.fstat(js._shared.slots.sections[0].pipe)
    with js.child_env(style) as env:
        words = env["MAKEFLAGS"].split()
        for found in (env["MAKEFLAGS"], words[-1], f" {words[-2]} --"):
            if "jobserver-auth" not in found:
                continue
            outer = open_outer(found)
            try:
                assert os.fstat(outer.fd).st_ino == pool.st_ino
            finally:
                os.close(outer.fd)
        assert len(env.pass_fds) == (0 if style == "fifo" else 2)
        for fd, access in zip(env.pass_fds, (os.O_RDONLY, os.O_WRONLY)):
            assert os.get_blocking(fd)
            assert not os.get_inheritable(fd)
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == access


@pytest.mark.contract("K3")
@pytest.mark.parametrize("style", ["", "FIFO", "named", None, 3])
def test_bad_style(js: Jobserver, style: Any) -> None:
    """A style that does not exist is refused."""
    with pytest.raises(ValueError):
        js.child_env(style)
    with pytest.raises(ValueError):
        js.popen_kwargs(style)


@pytest.mark.contract("K3")
def test_descriptors_end_with_the_environment(js: Jobserver) -> None:
    """The descriptors are closed by close, by the with-block, or with the last reference."""
    before = open_fds()
    env = js.child_env()
    copies = [dict(env), copy.copy(env), copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    assert len(open_fds()) == len(before) + 2

    env.close()
    env.close()
    assert open_fds() == before

    assert {type(made) for made in copies} == {dict}
    with js.child_env("pipe"):
        pass
    kwargs = js.popen_kwargs()
    del kwargs
    gc.collect()
    assert open_fds() == before


@pytest.mark.contract("K3")
def test_environment_is_ours_with_changes(js: Jobserver, clean: pytest.MonkeyPatch) -> None:
    """The rest of the environment is this process's, but for the changes asked for."""
    clean.setenv("JOBSERVER_KEPT", "1")
    clean.setenv("JOBSERVER_GONE", "1")
    clean.setenv("CARGO_MAKEFLAGS", "-j --jobserver-auth=3,4")

    with js.child_env("fifo", env={"JOBSERVER_GONE": None, "JOBSERVER_NEW": "2"}) as env:
        expected = {**os.environ, "JOBSERVER_NEW": "2", "MAKEFLAGS": env["MAKEFLAGS"]}
        del expected["JOBSERVER_GONE"], expected["CARGO_MAKEFLAGS"]
        assert env == expected
    with pytest.raises(ValueError):
        js.child_env(env={"": "x"})
    assert js.popen_kwargs(env={"MAKEFLAGS": "k"})["env"]["MAKEFLAGS"] == "k"


@pytest.mark.contract("K3", "H4")
def test_closed_jobserver_offers_nothing(clean: pytest.MonkeyPatch) -> None:
    """A closed Jobserver refuses with RuntimeError."""
    with Jobserver("fork", 1) as js:
        pass

    with pytest.raises(RuntimeError):
        js.child_env()
    with pytest.raises(RuntimeError):
        js.popen_kwargs()


@pytest.mark.contract("K3")
@pytest.mark.parametrize(
    ("before", "letters", "options", "variables"),
    [
        ("", "", [], []),
        ("ks", "ks", [], []),
        ("ks -j3 -l2.5 --jobserver-auth=3,4", "ks", ["-l2.5"], []),
        (" -j --jobserver-fds=3,4 --jobserver-auth=3,4 -Otarget", "", ["-Otarget"], []),
        ("--no-print-directory -j3", "", ["--no-print-directory"], []),
        ("k -- A=x\\ --jobserver-auth=9,9 B=$$c", "k", [], ["A=x --jobserver-auth=9,9", "B=$c"]),
        (" -- JOBSERVER_FIFO=x\\ --jobserver-auth=fifo:/gone C=1", "", [], ["C=1"]),
        ("FOO=bar", "", ["FOO=bar"], []),
        (" --eval=a:\\ b", "", ["--eval=a: b"], []),
    ],
)
@pytest.mark.parametrize("style", ["universal", "fifo", "pipe"])
def test_what_make_says_otherwise_is_kept(
    before: str, letters: str, options: list[str], variables: list[str], style: str
) -> None:
    """Other flags and variables of an outer make are handed on, its pool and its -j are not."""
    made = compose(before, style, "7,8", "/p", 5)

    words = split_flags(made)
    assert words[0] == letters
    end = words.index("--") if "--" in words else len(words)
    assert words[1:end][: len(options)] == options
    auth, slots = read_options(words)
    assert auth == ("fifo:/p" if style == "fifo" else "7,8")
    assert slots == (None if style == "universal" else 5)
    carried = ["JOBSERVER_FIFO=x --jobserver-auth=fifo:/p"] * (style == "universal")
    assert words[end + 1 :] == [*variables, *carried]
    assert made.split()[-1] == f"--jobserver-auth={'7,8' if style == 'pipe' else 'fifo:/p'}" or (
        style != "universal" and variables
    )


@pytest.mark.contract("K3")
def test_named_fifo_keeps_its_name(tmp_path: Path, clean: pytest.MonkeyPatch) -> None:
    """In a pool whose FIFO has a name that name is offered, unless only make could read it."""
    for name, kept in (("pool", True), ("a b", False)):
        path = tmp_path / name
        os.mkfifo(path)
        outer = os.open(path, os.O_RDWR)
        quoted = str(path).replace(" ", "\\ ")
        clean.setenv("MAKEFLAGS", f"s -j3 --jobserver-auth=fifo:{quoted}")
        with Jobserver.from_env("fork") as js, js.child_env("fifo") as env:
            assert env["MAKEFLAGS"].startswith("s -j3 --jobserver-auth=fifo:/")
            assert env["MAKEFLAGS"].endswith(f":{path}") is kept
            found = open_outer(env["MAKEFLAGS"])
            assert os.fstat(found.fd).st_ino == path.stat().st_ino
            os.close(found.fd)
        os.close(outer)


# What the tools make of it


def expect_width(js: Jobserver, future: Any, gate: Gate, width: int) -> tuple[int, str]:
    """The commands at the gate are as many as the slots, and no token is left for more."""
    pids = gate.await_entered(width)
    assert len(pids) == width
    assert free(js) == 0
    gate.open()
    status, text = future.result(PATIENCE)
    assert len(gate.entered()) >= 6
    return status, text


@pytest.mark.contract("K3", "K4", "N5")
@each_make()
@by_method("style, goal", [("auto", "deep"), ("auto", "all"), ("pipe", "all"), ("fifo", "all")])
def test_make_shares_the_slots(
    method: str, style: str, goal: str, make: Tool, tmp_path: Path, gate: Gate
) -> None:
    """A make in a job, and makes below it, run as many commands as there are slots, no more."""
    if not make.knows(style):
        pytest.skip("this make does not know the style fifo")
    lay_out(str(tmp_path), gate.directory, 6)
    with Jobserver(method, 3) as js:
        future = js(build, make.path, str(tmp_path), js, style, goal)

        # Two makes wait for their commands: the recipe that runs a make is on that make's slot.
        assert expect_width(js, future, gate, 3) == (0, "")
        assert free(js) == 3


@pytest.mark.contract("K3", "K4", "N5")
@each_ninja()
@by_method("style", ["auto", "fifo", "pipe"])
def test_ninja_shares_the_slots(
    method: str, style: str, ninja: Tool, tmp_path: Path, gate: Gate
) -> None:
    """A ninja in a job runs as many commands as there are slots, no more."""
    if not ninja.knows(style):
        pytest.skip("this ninja does not know the style pipe")
    lay_out(str(tmp_path), gate.directory, 6)
    with Jobserver(method, 3) as js:
        future = js(build, ninja.path, str(tmp_path), js, style, "--quiet")

        assert expect_width(js, future, gate, 3) == (0, "")
        assert free(js) == 3


@pytest.mark.contract("K3", "K4")
@each_make()
@each_ninja()
def test_ninja_below_make(make: Tool, ninja: Tool, tmp_path: Path, gate: Gate) -> None:
    """What make re-exports is still understood by a ninja below it."""
    lay_out(str(tmp_path), gate.directory, 6)
    (tmp_path / "top.mk").write_text(f"A = 1\nall:\n\t+@{ninja.path} --quiet\n")
    with Jobserver("fork", 3) as js:
        future = js(build, make.path, str(tmp_path), js, "auto", "-f", "top.mk", "B=2 3")

        assert expect_width(js, future, gate, 3) == (0, "")
        assert free(js) == 3


@pytest.mark.contract("K3", "K4")
@each_make()
def test_two_jobs_with_make_share(
    make: Tool, tmp_path: Path, make_gate: Callable[[], Gate]
) -> None:
    """Makes in several jobs together run as many commands as there are slots."""
    gate, start = make_gate(), make_gate()
    lay_out(str(tmp_path), gate.directory, 6)
    with Jobserver("fork", 3) as js:
        # The first make may take all tokens, so both jobs must have begun.
        futures = [js(build_after, start, make.path, str(tmp_path), js) for _ in range(2)]
        start.open()

        gate.await_entered(3)
        assert len(gate.entered()) == 3
        assert free(js) == 0
        gate.open()
        assert [future.result(PATIENCE) for future in futures] == [(0, "")] * 2
        assert free(js) == 3


def build_after(start: Gate, tool: str, directory: str, js: Jobserver) -> tuple[int, str]:
    """A job: build once the gate is open."""
    start.enter()
    return build(tool, directory, js, "auto")


CRATES = 4
WRAPPER = """\
#!/bin/sh
for word; do
  case $word in crate?) sh {directory}/enter {gate};; esac
done
exec "$@"
"""


@pytest.mark.contract("K3", "K4")
@needs("cargo")
def test_cargo_shares_the_slots(tmp_path: Path, gate: Gate) -> None:
    """Cargo compiles as many crates at once as there are slots."""
    lay_out(str(tmp_path), gate.directory, 1)
    names = [f"crate{number}" for number in range(CRATES)]
    (tmp_path / "Cargo.toml").write_text(f"[workspace]\nresolver = '2'\nmembers = {names}\n")
    for name in names:
        (tmp_path / name / "src").mkdir(parents=True)
        (tmp_path / name / "Cargo.toml").write_text(
            f"[package]\nname = '{name}'\nversion = '0.1.0'"
        )
        (tmp_path / name / "src" / "lib.rs").write_text("")
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(WRAPPER.format(directory=tmp_path, gate=gate.directory))
    wrapper.chmod(0o755)
    settings = {"RUSTC_WRAPPER": str(wrapper), "CARGO_INCREMENTAL": "0"}
    with Jobserver("fork", 3, env=settings) as js:
        future = js(build, "cargo", str(tmp_path), js, "auto", "check", "--offline", "--quiet")

        gate.await_entered(3)
        assert free(js) == 0
        assert len(gate.entered()) == 3
        gate.open()
        status, text = future.result(PATIENCE)
        assert (status, text) == (0, "")
        assert free(js) == 3


@pytest.mark.contract("K3", "K4")
@needs("gcc")
def test_gcc_finds_the_slots(tmp_path: Path) -> None:
    """gcc -flto=jobserver takes part, and says nothing of a jobserver that is not available."""
    (tmp_path / "main.c").write_text("int one(void); int main(void) { return one() - 1; }\n")
    (tmp_path / "one.c").write_text("int one(void) { return 1; }\n")
    goals = ["-O1", "-flto=jobserver", "-flto-partition=max", "main.c", "one.c", "-o", "main"]
    with Jobserver("fork", 3) as js:
        status, text = js(build, "gcc", str(tmp_path), js, "auto", *goals).result(PATIENCE)

        assert (status, text) == (0, "")
        assert free(js) == 3
    assert subprocess.run([tmp_path / "main"]).returncode == 0


@pytest.mark.contract("K3", "K4")
def test_python_below_python(js: Jobserver, gate: Gate) -> None:
    """Another program that uses this library joins the pool that it is offered."""
    program = (
        "import sys, helpers, pathlib\n"
        "from jobserver import Jobserver\n"
        "gate = helpers.Gate(pathlib.Path(sys.argv[1]))\n"
        "with Jobserver.from_env('fork') as js:\n"
        "    print(len([f.result() for f in [js(gate.enter) for _ in range(3)]]))\n"
    )
    future = js(run_python, js, program, gate.directory)
    gate.await_entered(3)
    assert free(js) == 0
    gate.open()

    assert future.result(PATIENCE) == "3\n"
    assert free(js) == 3


def run_python(js: Jobserver, *arguments: str) -> str:
    """A job: run a program that shares the slots."""
    path = os.pathsep.join(sys.path)
    out: str = subprocess.run(
        [sys.executable, "-c", *arguments],
        **js.popen_kwargs(env={"PYTHONPATH": path}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return out


def daemon(js: Jobserver) -> int:
    """A job: leave a process behind that lives on."""
    return subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=js.child_env("fifo"),
    ).pid


@pytest.mark.contract("K4")
@each_make_and_style()
def test_daemon_does_not_hold_up_the_outer_make(
    make: Tool, style: list[str], tmp_path: Path
) -> None:
    """A daemon that a job leaves behind holds no end of make's pipe."""
    (tmp_path / "program.py").write_text(
        "from jobserver import Jobserver\n"
        "from test_child_env import daemon\n"
        "with Jobserver.from_env('fork') as js:\n"
        "    js(len, '').result()\n"
        "    print(js(daemon, js).result())\n"
    )
    (tmp_path / "Makefile").write_text("all:\n\t+@$(PYTHON) program.py\n")
    done = subprocess.run(
        [make.path, "-j3", "--no-print-directory", *style],
        cwd=tmp_path,
        env={**program_environment(), "PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )

    os.kill(int(done.stdout), 9)
    assert (done.returncode, done.stderr) == (0, "")


def test_identity_of_slots_is_kept_by_a_spawned_handle(method: str, tmp_path: Path) -> None:
    """A worker of a joined pool knows which section is private to it, and does not offer that."""
    path = tmp_path / "pool"
    os.mkfifo(path)
    pool = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(pool, b"++")
    os.environ["MAKEFLAGS"] = f" -j3 --jobserver-auth=fifo:{path}"
    try:
        with Jobserver.from_env(method) as js:
            assert js(offered, js).result(PATIENCE).endswith(f"fifo:{path}")
            wait_until(lambda: free(js) == 3)
    finally:
        del os.environ["MAKEFLAGS"]
        os.close(pool)


def offered(js: Jobserver) -> str:
    """A job: what it would offer to a command."""
    with js.child_env("fifo") as env:
        return identity(env["MAKEFLAGS"])  # type: ignore[no-any-return]


# MAKEFLAGS of jobs


def plain_build(tool: str, directory: str, close_fds: bool) -> subprocess.CompletedProcess[bytes]:
    """A job: start a tool as any program would."""
    return subprocess.run([tool], cwd=directory, stdout=subprocess.DEVNULL, close_fds=close_fds)


@pytest.mark.contract("K8", "N5")
@each_make()
@by_method("tasks", [1, None])
def test_makeflags_of_jobs(
    method: str, tasks: int | None, make: Tool, tmp_path: Path, gate: Gate
) -> None:
    """With makeflags=True a make that a job starts takes part, whatever way it is started."""
    lay_out(str(tmp_path), gate.directory, 6)
    # A path is enough for make 4.4; make 4.3 needs the descriptors.
    by_path = make.version >= (4, 4) and tasks is None
    style: bool | str = "fifo" if by_path else True
    close_fds = by_path
    with Jobserver(method, 3, makeflags=style, max_tasks_per_child=tasks) as js:
        future = js(plain_build, make.path, str(tmp_path), close_fds)
        gate.await_entered(3)
        assert (len(gate.entered()), free(js)) == (3, 0)
        gate.open()
        assert future.result(PATIENCE).returncode == 0
        assert len(gate.entered()) == 6
        assert free(js) == 3


def flags_and_fds(value: str | None = None) -> tuple[str | None, int]:
    """A job: MAKEFLAGS, and how many descriptors are open."""
    return os.environ.get("MAKEFLAGS"), len(open_fds())


@pytest.mark.contract("K8")
def test_makeflags_are_a_default(method: str) -> None:
    """Submissions, map, the executor, copies and siblings follow it; the job's env goes first."""
    with Jobserver(method, 1, makeflags=True) as js, JobserverExecutor(js) as executor:
        for flags in (
            js(flags_and_fds).result(PATIENCE)[0],
            next(js.map(flags_and_fds, [()]))[0],
            copy.copy(js)(flags_and_fds).result(PATIENCE)[0],
            js.replace(makeflags=False).replace(makeflags=True)(flags_and_fds).result(PATIENCE)[0],
            executor.submit(flags_and_fds).result(PATIENCE)[0],
            js(nested_flags, js).result(PATIENCE),
        ):
            assert flags is not None
            assert "--jobserver-auth=fifo:" in flags
        plain = js.replace(makeflags=False)
        assert plain(flags_and_fds).result(PATIENCE)[0] is None
        assert js.submit(flags_and_fds, env={"MAKEFLAGS": "k"}).result(PATIENCE)[0] == "k"
    for bad in (1, None):
        with pytest.raises(TypeError):
            Jobserver(method, 1, makeflags=bad)  # type: ignore[arg-type]
    for name in ("", "yes"):
        with pytest.raises(ValueError):
            Jobserver(method, 1, makeflags=name)


def nested_flags(js: Jobserver) -> str | None:
    """A job: MAKEFLAGS of a job of its own."""
    return js(flags_and_fds).result()[0]


class Guard:
    """A preexec_fn that returns a context manager, and suppresses KeyError."""

    def __call__(self) -> Guard:
        assert "MAKEFLAGS" in os.environ
        return self

    def __enter__(self) -> None:
        os.environ["GUARDED"] = "1"

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is KeyError


def guarded() -> tuple[str, int]:
    """A job: what the guard has done."""
    return os.environ["GUARDED"], os.getpid()


@pytest.mark.contract("K8", "S9")
def test_makeflags_and_preexec_fn(method: str) -> None:
    """A preexec_fn works as without makeflags; worker processes that stay do not pile up files."""
    with Jobserver(method, 1, makeflags=True, preexec_fn=Guard(), max_tasks_per_child=None) as js:
        assert js(guarded).result(PATIENCE)[0] == "1"
        assert js(fail, KeyError).result(PATIENCE) is None
        with pytest.raises(ValueError):
            js(fail, ValueError).result(PATIENCE)
        counts = {js(flags_and_fds).result(PATIENCE)[1] for _ in range(4)}
        assert len(counts) == 1
        pids = {js(guarded).result(PATIENCE)[1] for _ in range(3)}
        assert len(pids) == 1
        pids = {js.submit(pid, preexec_fn=nothing).result(PATIENCE) for _ in range(3)}
        assert len(pids) == 3
