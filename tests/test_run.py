# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""js.run(): a command on a slot, as subprocess.run would, and whatever becomes of its slots."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from foreign import Tool, each_builder, each_make, lay_out
from helpers import PATIENCE, Gate, identity, open_fds, touch, wait_until
from marks import by_method

from jobserver import Blocked, Jobserver
from jobserver._slots import _inotify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def js() -> Iterator[Jobserver]:
    """A Jobserver with three slots."""
    with Jobserver("fork", 3) as jobserver:
        yield jobserver


def free(js: Jobserver) -> int:
    """How many tokens are free."""
    return js._shared.slots.free()


class Background:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._result: list[Any] = []
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self._result.append(call())
        except BaseException as error:
            self._result.append(error)

    def result(self) -> Any:
        """What it has returned or raised."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), "stuck"
        return self._result[0]


def waiter(gate: Gate) -> list[str]:
    """A command that passes a gate."""
    code = "import helpers, pathlib, sys; helpers.Gate(pathlib.Path(sys.argv[1])).enter()"
    return [sys.executable, "-c", code, gate.directory]


WITH_HELPERS = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
ECHO = "import sys; data = sys.stdin.buffer.read(); sys.stdout.buffer.write(data)"


# As subprocess.run


@pytest.mark.contract("K6")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"capture_output": True},
        {"capture_output": True, "text": True},
        {"stdout": subprocess.PIPE, "encoding": "latin-1"},
        {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "universal_newlines": True},
        {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        {"stdin": subprocess.PIPE, "capture_output": True},
        {"input": b"abc" * 200_000, "capture_output": True},
        {"input": "a\nb\r\n\xe4", "capture_output": True, "text": True},
        {"input": "", "capture_output": True, "text": True},
        {"shell": True, "capture_output": True, "cwd": "/"},
        {"capture_output": True, "env": {"A": "b"}},
        {"capture_output": True, "close_fds": False},
        {"capture_output": True, "start_new_session": True},
    ],
    # An id is put into the environment, where the long input has no room.
    ids=lambda kwargs: ",".join(f"{name}={str(value)[:20]}" for name, value in kwargs.items()),
)
def test_same_as_subprocess(js: Jobserver, kwargs: dict[str, Any]) -> None:
    """Output, error output and exit status are those of subprocess.run with the same arguments."""
    script = "cat; echo out; printf 'a\\r\\nb\\rc\\n'; pwd; echo err >&2; echo $A; exit 3"
    command: Any = script if kwargs.get("shell") else ["sh", "-c", script]
    if "input" not in kwargs and "stdin" not in kwargs:
        kwargs = {**kwargs, "stdin": subprocess.DEVNULL}

    expected = subprocess.run(command, **kwargs)
    done = js.run(command, **kwargs)

    assert (done.args, done.returncode) == (expected.args, expected.returncode)
    assert (done.stdout, done.stderr) == (expected.stdout, expected.stderr)
    assert free(js) == 3


@pytest.mark.contract("K6")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_command(js: Jobserver, number: int) -> None:
    """A command that is killed has minus the signal for its exit status."""
    done = js.run(["sh", "-c", f"kill -{number:d} $$"])

    assert done.returncode == -number


@pytest.mark.contract("K6")
def test_check(js: Jobserver) -> None:
    """With check, a failure is a CalledProcessError with all that is known."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        js.run(["sh", "-c", "echo out; exit 3"], check=True, capture_output=True, text=True)

    assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (3, "out\n", "")
    assert js.run(["true"], check=True).returncode == 0
    assert free(js) == 3


@pytest.mark.contract("K6")
def test_command_that_does_not_exist(js: Jobserver) -> None:
    """A command that cannot be started raises OSError and leaves nothing behind."""
    with pytest.raises(FileNotFoundError):
        js.run(["/no/such/command"], capture_output=True, input=b"x")
    with pytest.raises(PermissionError):
        js.run(["/"])

    assert free(js) == 3


@pytest.mark.contract("K6")
def test_command_that_does_not_read(js: Jobserver) -> None:
    """A command need not read its input."""
    assert js.run(["true"], input=b"x" * 1_000_000).returncode == 0


@pytest.mark.contract("K6")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"input": b"", "stdin": subprocess.PIPE},
        {"capture_output": True, "stdout": subprocess.PIPE},
        {"capture_output": True, "stderr": subprocess.PIPE},
        {"timeout": -1},
        {"style": "named"},
    ],
    ids=str,
)
def test_bad_arguments(js: Jobserver, kwargs: dict[str, Any]) -> None:
    """Arguments that contradict each other are refused, as by subprocess.run."""
    with pytest.raises(ValueError):
        js.run(["true"], **kwargs)
    with pytest.raises(TypeError):
        js.run(["true"], no_such_argument=1)

    assert free(js) == 3


@pytest.mark.contract("K6")
def test_timeout_kills(js: Jobserver) -> None:
    """Past the timeout the command is killed, and what it wrote is in the exception."""
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        js.run(["sh", "-c", "echo out; exec sleep 60"], timeout=0.3, stdout=subprocess.PIPE)

    assert caught.value.timeout == 0.3
    assert caught.value.output == b"out\n"
    assert free(js) == 3


@pytest.mark.contract("K6", "S4")
def test_timeout_without_a_slot(gate: Gate) -> None:
    """With no slot in time Blocked is raised, and nothing was started."""
    with Jobserver("fork", 1) as js:
        busy = js(gate.enter)
        for timeout in (0, 0.05):
            with pytest.raises(Blocked):
                js.run(["touch", f"{gate.directory}/in.1"], timeout=timeout)
        gate.open()
        assert [busy.result(PATIENCE)] == gate.entered()


@pytest.mark.contract("K6", "H4")
def test_closed(js: Jobserver) -> None:
    """A closed Jobserver runs nothing."""
    with Jobserver("fork", 1) as closed:
        pass
    with pytest.raises(RuntimeError):
        closed.run(["true"])


@pytest.mark.contract("K6")
def test_interrupt_ends_the_command(js: Jobserver, gate: Gate) -> None:
    """Ctrl-C in the waiting call ends the command and returns the slot."""

    def interrupt() -> None:
        gate.await_entered(1)
        # Not by raise_signal, whose signal comes to the thread that calls it and wakes no other.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    Background(interrupt)
    with pytest.raises(KeyboardInterrupt):
        js.run(waiter(gate), env=WITH_HELPERS)

    (pid,) = gate.entered()
    assert not os.path.exists(f"/proc/{pid}")
    assert free(js) == 3


# Slots


@pytest.mark.contract("K6", "K7", "N5")
@each_builder()
@pytest.mark.parametrize("style", ["auto", "pipe", "fifo"])
def test_width(builder: Tool, style: str, tmp_path: Path, gate: Gate, js: Jobserver) -> None:
    """A builder runs as many commands as there are slots, and returns them all."""
    if not builder.knows(style):
        pytest.skip("this tool does not know the style")
    lay_out(str(tmp_path), gate.directory, 6)

    run = Background(
        lambda: js.run([builder.path], style=style, cwd=tmp_path, stdout=subprocess.PIPE)
    )
    gate.await_entered(3)
    assert (len(gate.entered()), free(js)) == (3, 0)
    gate.open()

    assert run.result().returncode == 0
    assert len(gate.entered()) == 6
    assert free(js) == 3


def run_in_job(js: Jobserver, tool: str, directory: str) -> int:
    """A job: build."""
    return js.run([tool], cwd=directory, stdout=subprocess.DEVNULL).returncode


@pytest.mark.contract("K6", "K7", "N5")
@each_make()
@by_method("slots", [1, 3])
def test_width_in_a_job(method: str, slots: int, make: Tool, tmp_path: Path, gate: Gate) -> None:
    """In a job the command runs on the job's own slot, and on what is free."""
    lay_out(str(tmp_path), gate.directory, 4)
    with Jobserver(method, slots) as js:
        future = js(run_in_job, js, make.path, str(tmp_path))
        gate.await_entered(slots)
        assert (len(gate.entered()), free(js)) == (slots, 0)
        gate.open()

        assert future.result(PATIENCE) == 0
        assert len(gate.entered()) == 4
        assert free(js) == slots


@pytest.mark.contract("K7", "N5")
@each_builder()
def test_two_builders_share(builder: Tool, tmp_path: Path, gate: Gate, js: Jobserver) -> None:
    """Two commands at once together run no more than there are slots."""
    lay_out(str(tmp_path), gate.directory, 6)

    def run() -> int:
        return js.run([builder.path], cwd=tmp_path, stdout=subprocess.DEVNULL).returncode

    # ninja keeps a log, which it can share with nobody.
    runs = [Background(run) for _ in range(1 if builder.kind == "ninja" else 2)]
    others = [Background(lambda: js.run(waiter(gate), env=WITH_HELPERS)) for _ in range(2)]
    gate.await_entered(3)
    assert (len(gate.entered()), free(js)) == (3, 0)
    gate.open()

    assert {run.result() for run in runs} == {0}
    assert {other.result().returncode for other in others} == {0}
    assert free(js) == 3


@pytest.mark.contract("K7")
@each_builder()
def test_killed_builder_loses_nothing(
    builder: Tool, tmp_path: Path, gate: Gate, js: Jobserver
) -> None:
    """After a SIGKILL of the whole tree of a builder all slots are back."""
    lay_out(str(tmp_path), gate.directory, 6)
    run = Background(
        lambda: js.run(
            [builder.path], cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL
        )
    )
    session = os.getsid(gate.await_entered(3)[0])
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)

    assert run.result().returncode == -signal.SIGKILL
    assert free(js) == 3


LOSES = """\
import os, sys, time
path = os.environ["MAKEFLAGS"].split("fifo:")[1]
fd = os.open(path, os.O_RDWR)
os.write(fd, b"x" * int(sys.argv[1]))
for _ in range(int(sys.argv[2])):
    os.read(fd, 1)
"""


@pytest.mark.contract("K7")
@pytest.mark.parametrize(("invents", "loses"), [(0, 2), (20, 0), (20, 2)])
def test_lost_and_invented_tokens_are_private(
    js: Jobserver, gate: Gate, invents: int, loses: int
) -> None:
    """Tokens that a command loses or makes up do not change the pool."""
    command = [sys.executable, "-c", LOSES, str(invents), str(loses)]
    for _ in range(3):
        assert js.run(command).returncode == 0
        assert free(js) == 3


SLOW_NINJA = """\
#!{python}
import os, time
path = os.environ["MAKEFLAGS"].split("fifo:")[1]
fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
taken = 0
try:
    while True:
        begin = time.process_time()
        while time.process_time() < begin + 0.1:
            pass
        os.read(fd, 1)
        taken += 1
except BlockingIOError:
    raise SystemExit(taken)
"""


@pytest.mark.contract("K6")
def test_builder_that_takes_its_time(
    js: Jobserver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is offered to a builder is left to it while it works its way to the last of it."""
    monkeypatch.setattr("jobserver._slots._shadow._BUSY", PATIENCE)
    ninja = tmp_path / "ninja"
    ninja.write_text(SLOW_NINJA.format(python=sys.executable))
    ninja.chmod(0o755)

    assert js.run([ninja]).returncode == 2
    assert free(js) == 3


@pytest.mark.contract("K7")
@pytest.mark.parametrize("blind", [False, True])
def test_offered_slots_come_back(
    gate: Gate, tmp_path: Path, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is offered to a command that does not take it is there for others."""
    if blind:

        def refuse(fifo: int, *, spare: int) -> int:
            raise OSError(24, "no inotify instance left")

        monkeypatch.setattr(_inotify, "watch", refuse)
    script = f"import time; time.sleep(0.1)\n{LOSES}".replace("os.write", "#")
    builder = tmp_path / "make"  # so that all slots are offered to it
    builder.write_text(
        f"#!{sys.executable}\n{script}\nimport helpers, pathlib\n"
        "helpers.Gate(pathlib.Path(sys.argv[3])).enter()\n"
    )
    builder.chmod(0o755)
    with Jobserver("fork", 3) as js:
        command = [builder, "0", "1", gate.directory]
        run = Background(lambda: js.run(command, env=WITH_HELPERS))
        gate.await_entered(1)
        # It holds one besides its own, and the third is had by whoever wants it, again and again.
        for number in range(3):
            job = js.submit(identity, args=(number,), timeout=PATIENCE)
            assert job.result(PATIENCE) == number
        gate.open()
        assert run.result().returncode == 0
        assert free(js) == 3


@pytest.mark.contract("K7")
def test_jobs_are_reaped_and_callbacks_issued(js: Jobserver, tmp_path: Path, gate: Gate) -> None:
    """While a command runs other jobs are seen to end, and their callbacks called."""
    job = js(gate.enter)
    job.when_done(fail_after, str(tmp_path / "done"))
    gate.await_entered(1)
    script = f"mkdir {gate.directory}/open; until [ -e {tmp_path}/done ]; do sleep 0.01; done"

    with pytest.warns(RuntimeWarning, match="suppressed CallbackRaised"):
        assert js.run(["sh", "-c", script], timeout=PATIENCE).returncode == 0
    assert free(js) == 3


def fail_after(path: str) -> None:
    """A callback that does its work and fails."""
    touch(path)
    raise KeyError(path)


@pytest.mark.contract("K7")
def test_killed_runner(js: Jobserver, gate: Gate) -> None:
    """The slots of a process that is killed while it runs a command come back."""
    child = os.fork()
    if child == 0:
        js.run(waiter(gate), env=WITH_HELPERS)
        os._exit(0)
    gate.await_entered(1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    wait_until(lambda: js._shared.slots.sweep() or free(js) == 3)
    gate.open()


@pytest.mark.contract("K7")
def test_descriptors_are_as_many_after_many_commands(js: Jobserver) -> None:
    """The number of descriptors does not grow with the commands run."""
    counts = set()
    js.run(["sleep", "0.05"])  # waited for, so what waiting needs is there from now on
    for _ in range(4):
        js.run(["true"], capture_output=True)
        counts.add(len(open_fds()))

    assert len(counts) == 1


@pytest.mark.contract("K7")
def test_threads_run_commands(js: Jobserver) -> None:
    """Many threads may run commands at once."""
    runs = [
        Background(lambda: js.run(["cat"], input=b"x" * 100_000, stdout=subprocess.PIPE).stdout)
        for _ in range(8)
    ]

    assert {len(run.result()) for run in runs} == {100_000}
    assert free(js) == 3
