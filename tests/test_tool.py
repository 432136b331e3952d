# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The command jobserver: run, exec, serve and status."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from foreign import Tool, each_builder, each_make, lay_out, needs
from helpers import PATIENCE, Gate, has_ended, run_program, started_program, wait_until

import jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def tool(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return run_program(["-m", "jobserver", *arguments], **kwargs)  # type: ignore[arg-type]


def kill_session(process: subprocess.Popen[str]) -> None:
    """Kill the command's own process, and nobody else."""
    os.kill(process.pid, signal.SIGKILL)


# Users' errors


@pytest.mark.contract("K9")
@pytest.mark.parametrize("action", [[], ["run"], ["exec"], ["serve"], ["status"]])
def test_help(action: list[str]) -> None:
    """--help explains each action on the standard output."""
    done = tool(*action, "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) > 6
    assert tool("--version").stdout == f"jobserver {jobserver.__version__}\n"


@pytest.mark.contract("K9")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, "ACTION"),
        (["fly"], 2, "fly"),
        (["run"], 2, "COMMAND"),
        (["run", "-j0", "--", "true"], 2, "at least 1"),
        (["run", "-jx", "--", "true"], 2, "-j"),
        (["run", "--", "/no/such/command"], 127, "no such command"),
        (["run", "-j2", "--", "no-such-command"], 127, "no such command"),
        (["run", "--", "/"], 126, "ermission denied"),
        (["exec", "--", "true"], 2, "not started by make"),
        (["status"], 2, "not started by make"),
        (["status", "--path", "/no/such"], 2, "cannot be opened"),
        (["status", "--path", "/dev/null"], 2, "no FIFO"),
        (["serve"], 2, "--path"),
        (["serve", "--path", "/"], 2, "File exists"),
        (["serve", "--path", "/no/such/directory"], 2, "No such file"),
        (["serve", "--path", "/tmp/a b"], 2, "blanks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_user_errors(arguments: list[str], status: int, words: str) -> None:
    """A user's error is one message on the standard error, without a traceback."""
    done = tool(*arguments)

    assert (done.returncode, done.stdout) == (status, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.contract("K9")
def test_unusable_makeflags() -> None:
    """Inside a pool that cannot be joined exec says why."""
    done = tool("exec", "--", "true", env={"MAKEFLAGS": " -j3 --jobserver-auth=97,98"})

    assert done.returncode == 2
    assert done.stderr.startswith("jobserver: ")
    assert '"+"' in done.stderr


# run


@pytest.mark.contract("K9")
@pytest.mark.parametrize("jobs", ["-j1", "-j3"])
def test_exit_status(jobs: str) -> None:
    """The exit status is that of the command, or 128 plus a signal."""
    for script, status in (("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill $$", 143)):
        assert tool("run", jobs, "--", "sh", "-c", script).returncode == status


@pytest.mark.contract("K9")
def test_streams_and_arguments_are_the_commands() -> None:
    """The command gets the standard streams and its arguments as they are."""
    done = tool("run", "--", "sh", "-c", 'cat; echo "$1"; echo err >&2', "x", "-j 3", stdin="in\n")

    assert (done.stdout, done.stderr) == ("in\n-j 3\n", "err\n")


@pytest.mark.contract("K9")
@pytest.mark.parametrize("jobs", ["-j1", "-j3"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_are_forwarded(jobs: str, number: int) -> None:
    """A signal that is sent to jobserver is sent on to the command, which decides."""
    script = f"trap 'echo caught; exit 5' {number:d}; echo ready; while :; do sleep 0.01; done"
    with started_program(["-m", "jobserver", "run", jobs, "--", "sh", "-c", script]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "caught\n"
        assert process.wait(PATIENCE) == 5


@pytest.mark.contract("K9", "K4")
@each_builder()
def test_run_gives_the_slots(builder: Tool, tmp_path: Path, gate: Gate) -> None:
    """A builder below run has as many slots as were asked for, and gives all tokens back."""
    lay_out(str(tmp_path), gate.directory, 6)
    command = ["-m", "jobserver", "run", "-j3", "--check", "--", builder.path]
    with started_program(command, cwd=tmp_path) as process:
        gate.await_entered(3)
        free = json.loads(status_of(gate.entered()[0]))["free"]
        assert (len(gate.entered()), free) == (3, 0)
        gate.open()
        assert process.wait(PATIENCE) == 0
    assert len(gate.entered()) == 6


def status_of(pid: int) -> str:
    """What `jobserver status` says in the environment of another process."""
    with open(f"/proc/{pid}/environ") as stream:
        (flags,) = (word for word in stream.read().split("\0") if word.startswith("MAKEFLAGS="))
    path = flags.split("fifo:")[1]
    done = tool("status", "--json", "--path", path)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.contract("K9")
@each_make()
def test_run_of_one(make: Tool, tmp_path: Path, gate: Gate) -> None:
    """With one slot a make below run does one thing at a time, and does not complain."""
    lay_out(str(tmp_path), gate.directory, 3)
    gate.open()
    done = tool("run", "-j1", "--check", "--", make.path, cwd=tmp_path)

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


TAKES = """\
import os, sys
fd = os.open(os.environ["MAKEFLAGS"].split("fifo:")[1], os.O_RDWR)
os.read(fd, int(sys.argv[1])), os.write(fd, b"+" * int(sys.argv[2]))
"""


@pytest.mark.contract("K9")
def test_check_tells_what_is_missing() -> None:
    """--check tells of lost and of surplus tokens, and makes a success a failure."""
    for taken, given, words in (
        (2, 0, "2 of 3 tokens are missing"),
        (1, 0, "1 of 3 token is missing"),
        (0, 2, "2 tokens are too many"),
    ):
        command = [sys.executable, "-c", TAKES, str(taken), str(given)]
        done = tool("run", "-j4", "--check", "--", *command)
        assert (done.returncode, words in done.stderr) == (1, True), done.stderr
        assert tool("run", "-j4", "--", *command).stderr == ""


@pytest.mark.contract("K9")
def test_check_names_who_holds_the_pool() -> None:
    """--check names the processes that still have the pool open."""
    child = (
        "import os, time; fd = os.open({!r}, os.O_RDWR); os.read(fd, 1); print(); time.sleep(60)"
    )
    script = (
        "import os, subprocess, sys\n"
        'path = os.environ["MAKEFLAGS"].split("fifo:")[1]\n'
        f"code = {child!r}.format(path)\n"
        "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE,"
        " stderr=subprocess.DEVNULL)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
    )
    done = tool("run", "-j4", "--check", "--", sys.executable, "-c", script)

    pid = int(done.stdout)
    os.kill(pid, signal.SIGKILL)
    assert done.returncode == 1
    assert f"still open in process {pid}: {sys.executable} -c" in done.stderr


# exec


@pytest.mark.contract("K9", "N5")
def test_exec_waits_for_a_slot(tmp_path: Path, gate: Gate) -> None:
    """Commands below exec run as many at once as there are tokens besides the caller's slot."""
    lay_out(str(tmp_path), gate.directory, 1)
    one = f"{sys.executable} -m jobserver exec -- sh enter {gate.directory} &"
    with started_program(
        ["-m", "jobserver", "run", "-j3", "--check", "--", "sh", "-c", one * 4 + " wait"],
        cwd=tmp_path,
    ) as process:
        gate.await_entered(2)
        state = json.loads(status_of(gate.entered()[0]))
        assert (len(gate.entered()), state["free"]) == (2, 0)
        assert sum(peer["parked"] for peer in state["processes"]) >= 2
        gate.open()
        assert process.wait(PATIENCE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert len(gate.entered()) == 4


@pytest.mark.contract("K9")
def test_exec_without_tokens() -> None:
    """Below -j1 exec runs its command at once, and in a dry run not at all."""
    inner = [sys.executable, "-m", "jobserver", "exec", "--", "sh", "-c", "echo ran; exit 3"]
    done = tool("run", "-j1", "--", *inner)
    assert (done.returncode, done.stdout, done.stderr) == (3, "ran\n", "")

    done = tool(*inner[3:], env={"MAKEFLAGS": "n -j3 --jobserver-auth=fifo:/x"})
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.contract("K9")
@each_builder()
def test_exec_in_a_recipe(builder: Tool, tmp_path: Path) -> None:
    """In a recipe exec uses the recipe's slot, so that recipes do not wait for each other."""
    command = f"{sys.executable} -m jobserver exec -- sh -c"
    names = [f"job{number}" for number in range(6)]
    (tmp_path / "Makefile").write_text(
        f"all: {' '.join(names)}\n{' '.join(names)}:\n\t+@cd . && {command} 'echo ran $@'\n"
        f"bad:\n\t+@{command} 'exit 9'\n"
    )
    (tmp_path / "build.ninja").write_text(
        f"rule job\n command = {command} 'echo ran $out'\n"
        + "".join(f"build {name}: job\n" for name in names)
    )
    run = ["run", "-j3", "--check", "--", builder.path]
    done = tool(*run, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f"ran {name}" in done.stdout for name in names] == [True] * 6
    if builder.kind == "make":
        assert "Error 9" in tool(*run, "bad", cwd=tmp_path).stderr


# serve and status


class Served:
    """A running `jobserver serve`."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path
        assert process.stdout is not None
        export, _, value = process.stdout.readline().partition("=")
        assert export == "export MAKEFLAGS"
        (self.flags,) = shlex.split(value)

    def free(self) -> int:
        """How many tokens are free."""
        count: int = json.loads(tool("status", "--json", "--path", str(self.path)).stdout)["free"]
        return count


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A pool of four."""
    path = tmp_path / "pool"
    command = ["-m", "jobserver", "serve", "-j4", "--path", str(path)]
    with started_program(command) as process:
        yield Served(process, path)


@pytest.mark.contract("K9")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_ends_cleanly(served: Served, number: int) -> None:
    """serve makes a FIFO that is the user's alone, and removes it when told to stop."""
    assert served.flags == f" -j4 --jobserver-auth=fifo:{served.path}"
    assert served.path.stat().st_mode & 0o777 == 0o600
    assert served.free() == 4

    served.process.send_signal(number)
    assert served.process.wait(PATIENCE) == 0
    assert not served.path.exists()
    assert served.process.stderr is not None
    assert served.process.stderr.read() == ""


@pytest.mark.contract("K9")
def test_serve_for_a_group(tmp_path: Path) -> None:
    """With --group the FIFO is the group's, too; a group that does not exist is a user's error."""
    path = tmp_path / "pool"
    command = ["-m", "jobserver", "serve", "-j4", "--path", str(path), "--group"]
    with started_program([*command, str(os.getgid())]) as process:
        Served(process, path)
        assert path.stat().st_mode & 0o777 == 0o660
    path.unlink()
    done = tool(*command[2:], "no-such-group")
    assert (done.returncode, path.exists()) == (2, False)


@pytest.mark.contract("K9")
@needs("make")
def test_served_pool_is_shared(served: Served, tmp_path: Path, gate: Gate) -> None:
    """Runs that know nothing of each other share the pool, each on a slot of its own."""
    lay_out(str(tmp_path), gate.directory, 6)
    env = {"MAKEFLAGS": served.flags}
    command = ["-m", "jobserver", "exec", "--", "make"]
    one = started_program(command, cwd=tmp_path, env=env)
    with one as first, started_program(command, cwd=tmp_path, env=env) as second:
        gate.await_entered(4)
        assert (len(gate.entered()), served.free()) == (4, 0)
        gate.open()
        assert (first.wait(PATIENCE), second.wait(PATIENCE)) == (0, 0)
    assert served.free() == 4


@pytest.mark.contract("K9")
def test_served_pool_survives_its_clients(served: Served) -> None:
    """Tokens of a killed client are replaced once no client is left, not before."""
    code = (
        "import os, signal, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR)\n"
        "os.read(fd, 2)\n"
        "print(flush=True)\n"
        "signal.pause()\n"
    )
    command = ["-c", code, str(served.path)]
    with started_program(command) as one, started_program(command) as two:
        for client in (one, two):
            assert client.stdout is not None
            client.stdout.readline()
        assert served.free() == 0
        kill_session(one)
        wait_until(lambda: has_ended(one.pid))
        assert served.free() == 0
        kill_session(two)
        wait_until(lambda: served.free() == 4)


@pytest.mark.contract("K9")
def test_status_shows_who_takes_part(served: Served) -> None:
    """status names the processes that have the pool open, in words and as JSON."""
    state = json.loads(tool("status", "--json", env={"MAKEFLAGS": served.flags}).stdout)
    assert (state["slots"], state["free"]) == (4, 4)
    (peer,) = state["processes"]
    assert peer["pid"] == served.process.pid
    assert "jobserver serve" in peer["command"]
    assert peer["parked"] == 0

    text = tool("status", "--path", str(served.path)).stdout
    assert text.startswith("4 tokens free\n")
    assert str(served.process.pid) in text


@pytest.mark.contract("K9")
def test_watching(served: Served) -> None:
    """status --watch goes on until Ctrl-C, and does not mind a reader that goes."""
    with started_program(
        ["-m", "jobserver", "status", "--watch", "--path", str(served.path)]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "4 tokens free\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None
        assert process.stderr.read() == ""
