# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Each tool that is installed, in both roles and each style: what it makes of four slots.

Tests assert it, and `tools/interop.py` prints it as a table.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

from foreign import Tool, lay_out, makes, ninjas
from helpers import PATIENCE, Gate, program_environment

from jobserver import Jobserver

if TYPE_CHECKING:
    from pathlib import Path

SLOTS = 4
#: Commands that could run at once, if it were not for the slots.
MOST = 6
STYLES = ["universal", "fifo", "pipe"]


class Case(NamedTuple):
    """A tool, who brings the slots, and how they are offered."""

    tool: str
    server: str
    how: str
    style: str

    def __str__(self) -> str:
        return "-".join(part.replace(" ", "_") for part in self)


class Seen(NamedTuple):
    """What came of it."""

    status: int
    #: How many commands ran at once, when no more came.
    width: int
    #: How many slots were free at the end.
    back: int
    said: str


# Our slots, their commands


def build_cases() -> list[Case]:
    """The tools that may share slots of ours."""
    tools = [name_of(tool) for tool in [*makes(), *ninjas()]]
    tools += [first_line(name) for name in ("cargo", "gcc") if installed(name)]
    return [
        Case(tool, "this library", how, style)
        for tool in tools
        for how in ("run", "child_env")
        for style in STYLES
    ]


def understands(case: Case) -> bool:
    """Whether the tool takes part in what this style offers."""
    for tool in [*makes(), *ninjas()]:
        if name_of(tool) == case.tool:
            return tool.knows(case.style)
    # gcc knows FIFOs from version 13 on.
    version = re.search(r" (\d+)\.\d", case.tool)
    assert version is not None
    return not (case.tool.startswith("gcc") and int(version[1]) < 13 and case.style == "fifo")


def name_of(tool: Tool) -> str:
    """What a tool calls itself."""
    if tool.kind == "make":
        return tool.text
    return f"ninja {tool.text}" if tool.is_kitwares else f"ninja {tool.text} (upstream)"


@functools.cache
def first_line(name: str) -> str:
    """Name and version."""
    done = subprocess.run([name, "--version"], capture_output=True, text=True)
    version = re.search(r"\d+\.\d+(\.\d+)?", done.stdout)
    return f"{name} {version[0] if version else ''}"


@functools.cache
def installed(name: str) -> bool:
    """Whether there is such a command."""
    import shutil

    return shutil.which(name) is not None


def command_for(tool: str, directory: Path, gate: Gate) -> tuple[list[str], dict[str, str]]:
    """A command with MOST commands below it that enter the gate, and its environment."""
    lay_out(str(directory), gate.directory, MOST)
    enter = f"sh {directory}/enter {gate.directory}"
    if tool.startswith("cargo"):
        return lay_out_cargo(directory, enter)
    if tool.startswith("gcc"):
        return lay_out_gcc(directory, enter)
    (path,) = [each.path for each in [*makes(), *ninjas()] if name_of(each) == tool]
    return [path], {}


def script(path: Path, text: str) -> str:
    """An executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def lay_out_cargo(directory: Path, enter: str) -> tuple[list[str], dict[str, str]]:
    """A workspace of crates that do not depend on each other."""
    names = [f"crate{number}" for number in range(MOST)]
    (directory / "Cargo.toml").write_text(f"[workspace]\nresolver = '2'\nmembers = {names}\n")
    for name in names:
        (directory / name / "src").mkdir(parents=True)
        (directory / name / "Cargo.toml").write_text(
            f"[package]\nname = '{name}'\nversion = '0.1.0'"
        )
        (directory / name / "src" / "lib.rs").write_text("")
    wrapper = script(
        directory / "wrapper",
        f'#!/bin/sh\nfor word; do case $word in crate?) {enter};; esac; done\nexec "$@"\n',
    )
    env = {"RUSTC_WRAPPER": wrapper, "CARGO_INCREMENTAL": "0"}
    return ["cargo", "check", "--offline", "--quiet"], env


def lay_out_gcc(directory: Path, enter: str) -> tuple[list[str], dict[str, str]]:
    """A program in as many parts, which are compiled when it is linked."""
    for number in range(MOST - 1):
        (directory / f"f{number}.c").write_text(f"int f{number}(void) {{ return 0; }}\n")
    calls = [f"f{number}()" for number in range(MOST - 1)]
    declared = "".join(f"int {call[:-1]}void);\n" for call in calls)
    (directory / "main.c").write_text(f"{declared}int main(void) {{ return {'+'.join(calls)}; }}\n")
    # For each part the linker's plug-in runs the gcc that it was itself run by.
    found = subprocess.run(["gcc", "-print-search-dirs"], capture_output=True, text=True).stdout
    install = found.splitlines()[0].partition(": ")[2]
    wrapper = script(
        directory / "gcc",
        f'#!/bin/bash\ncase " $* " in *" -fltrans "*) {enter};; esac\n'
        f'exec -a "$0" "$(PATH=${{PATH#*:}} command -v gcc)" "$@"\n',
    )
    sources = [f"f{number}.c" for number in range(MOST - 1)]
    return [wrapper, "-O0", "-flto=jobserver", "-flto-partition=1to1", "main.c", *sources], {
        "GCC_EXEC_PREFIX": os.path.normpath(f"{install}/../..") + "/",
        "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
    }


def build(js: Jobserver, command: list[str], style: str, **kwargs: Any) -> Any:
    """A job: start a tool that shares the slots of js."""
    shared = js.popen_kwargs(style, env=kwargs.pop("env"))
    return subprocess.run(command, **shared, **kwargs)


def serve(case: Case, directory: Path, gate: Gate, settle: float = 0.0) -> Seen:
    """Start a tool on SLOTS slots of ours; look for so many seconds whether there are too many."""
    command, env = command_for(case.tool, directory, gate)
    kwargs: dict[str, Any] = {"cwd": directory, "stdin": subprocess.DEVNULL}
    kwargs.update(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with Jobserver("fork", SLOTS) as js:
        results: list[Any] = []
        if case.how == "run":
            kwargs["env"] = {**os.environ, **env}
            call: Callable[[], Any] = functools.partial(js.run, command, style=case.style, **kwargs)
        else:
            future = js(build, js, command, case.style, env=env, **kwargs)
            call = functools.partial(future.result, PATIENCE)
        thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
        thread.start()
        try:
            width = await_width(gate, thread, settle)
        finally:
            gate.open()
            thread.join(PATIENCE)
        done = results[0]
        return Seen(done.returncode, width, js._shared.slots.free(), done.stdout)


def await_width(gate: Gate, thread: threading.Thread, settle: float) -> int:
    """How many come, until they are SLOTS, or no more come for a while."""
    deadline = time.monotonic() + PATIENCE
    count, since = 0, time.monotonic()
    while thread.is_alive() and time.monotonic() < deadline:
        found = len(gate.entered())
        if found != count:
            count, since = found, time.monotonic()
        # A tool that does not get as far has another opinion of the slots.
        if time.monotonic() > since + (settle if count >= SLOTS else 3 if count else PATIENCE):
            break
        time.sleep(0.01)
    return len(gate.entered())


# Their slots, our commands

#: Says how many slots there are: as many jobs as can be submitted.
PROGRAM = """\
import signal, sys
from jobserver import Blocked, Jobserver
from jobserver.makeflags import MakeflagsError
try:
    js = Jobserver.from_env("fork")
except MakeflagsError as error:
    said = type(error).__name__
else:
    with js:
        futures = []
        try:
            while len(futures) < 20:
                futures.append(js.submit(signal.pause, timeout=0))
        except Blocked:
            pass
        said = len(futures)
        for future in futures:
            future.wait(signal=9)
with open(sys.argv[1], "a") as stream:
    print(said, file=stream)
"""


def join_cases() -> list[Case]:
    """The tools whose slots we may use."""
    found = []
    for make in makes():
        styles = ["pipe", "fifo"] if make.version >= (4, 4) else ["pipe"]
        for style in styles:
            found += [Case("this library", name_of(make), how, style) for how in ("+", "no +")]
    if installed("cargo"):
        found.append(Case("this library", first_line("cargo"), "a build script", "pipe"))
    return [
        *found,
        Case("this library", "jobserver run", "it", "universal"),
        Case("this library", "jobserver serve", "jobserver exec", "fifo"),
    ]


def offers(case: Case) -> str:
    """What our program says of these slots: their number, or an exception's name."""
    if case.how != "no +" or case.style == "fifo":
        return str(SLOTS)
    # Since 4.4 make says that it does not offer them, before it was silent.
    return "PoolDisabled" if "4.3" not in case.server else "DescriptorsClosed"


def join(case: Case, directory: Path) -> tuple[list[str], Seen]:
    """Run our program twice on SLOTS slots of a tool; what it says, and what the tool does."""
    program = directory / "program.py"
    program.write_text(PROGRAM)
    said = directory / "said"
    ours = f"{sys.executable} {program} {said}"
    env = program_environment()
    if case.server.startswith("cargo"):
        done = run_cargo(directory, ours, env)
    elif case.server.startswith("jobserver"):
        done = run_jobserver(case.server.split()[1], directory, ours, env)
    else:
        (make,) = [tool for tool in makes() if name_of(tool) == case.server]
        plus = "+" * (case.how == "+")
        (directory / "Makefile").write_text(f"all: one two\none two:\n\t{plus}@{ours}\ntwo: one\n")
        style = [f"--jobserver-style={case.style}"] if make.version >= (4, 4) else []
        done = finish([make.path, f"-j{SLOTS}", *style], directory, env)
    counts = said.read_text().split() if said.exists() else []
    width = max([int(word) for word in counts if word.isdigit()], default=0)
    lost = "INTERNAL" in done.stdout or "missing" in done.stdout
    return counts, Seen(done.returncode, width, SLOTS - lost, done.stdout)


def finish(
    command: list[str], directory: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        cwd=directory,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )


def run_cargo(directory: Path, ours: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Let a build script run our program, twice."""
    first, *others = ours.split()
    words = ", ".join(f'"{word}"' for word in others)
    (directory / "src").mkdir()
    (directory / "src" / "lib.rs").write_text("")
    (directory / "Cargo.toml").write_text("[package]\nname = 'one'\nversion = '0.1.0'\n")
    (directory / "build.rs").write_text(
        "fn main() { for _ in 0..2 { assert!(std::process::Command::new("
        f'"{first}").args([{words}]).status().unwrap().success()); }} }}\n'
    )
    # What is built for the build only is not optimised, so rustc itself has one thing to do.
    return finish(["cargo", "check", "--offline", "--quiet", f"-j{SLOTS}"], directory, env)


def run_jobserver(
    command: str, directory: Path, ours: str, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run our program below the command `jobserver`, twice."""
    us = [sys.executable, "-m", "jobserver"]
    if command == "run":
        twice = ["sh", "-c", f"{ours} && {ours}"]
        return finish([*us, "run", f"-j{SLOTS}", "--check", "--", *twice], directory, env)
    serve_it = [*us, "serve", f"-j{SLOTS}", "--path", str(directory / "pool")]
    with subprocess.Popen(serve_it, env=env, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            flags = server.stdout.readline().partition("=")[2].strip().strip("'")
            below = {**env, "MAKEFLAGS": flags}
            for _ in range(2):
                done = finish([*us, "exec", "--", *ours.split()], directory, below)
            status = finish([*us, "status"], directory, below).stdout
            missing = "" if status.startswith(f"{SLOTS} tokens free") else f"missing: {status}"
            return subprocess.CompletedProcess(done.args, done.returncode, done.stdout + missing)
        finally:
            server.terminate()
