# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What is shipped: the distribution's files and metadata, and what an import costs its importer."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import jobserver

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "jobserver"
PUBLIC = {
    "Blocked",
    "CallbackRaised",
    "Future",
    "Jobserver",
    "JobserverExecutor",
    "SubmissionDied",
    "__version__",
}


def build(kind: str, directory: Path) -> Path:
    """Build a `wheel` or an `sdist` with the project's own build backend."""
    code = f"from hatchling.build import build_{kind} as build; print(build({str(directory)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return directory / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built anew."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_string(archive.read(name).decode())


def alone(code: str) -> list[str]:
    """Run code in an interpreter that sees the package and the standard library; its words."""
    prelude = f"import sys; sys.path.insert(0, {str(Path(jobserver.__file__).parents[1])!r});"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-W", "error", "-c", prelude + code],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def top_level_imports(path: Path, modules: set[str]) -> set[str]:
    """Those of the package's modules that a module imports while it is itself imported."""
    package = path.relative_to(PACKAGE.parent).parts[:-1]
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            # What is named is a module of a package, or something that a module defines.
            found |= names & modules or {base}
    return found & modules


def module_name(path: Path) -> str:
    """The dotted name of a source file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.contract("P1")
def test_public_names_are_the_promised_ones() -> None:
    """The package exports the names of the contract and no others."""
    starred: dict[str, object] = {}
    exec("from jobserver import *", starred)
    ours = {
        name
        for name in dir(jobserver)
        if getattr(getattr(jobserver, name), "__module__", "").startswith("jobserver")
    }

    assert set(jobserver.__all__) == PUBLIC
    assert set(starred) - {"__builtins__"} == PUBLIC
    assert {name for name in ours if not name.startswith("_")} == PUBLIC - {"__version__"}


@pytest.mark.contract("P2")
def test_import_needs_the_standard_library_only() -> None:
    """Importing the package loads no module from anywhere but the standard library and itself."""
    code = """
import jobserver, sysconfig
std = sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"]
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and not file.startswith(std) and name.split(".")[0] != "jobserver":
        print(name)
"""

    assert alone(code) == []


def test_import_leaves_the_process_alone() -> None:
    """Importing the package starts no thread, opens no descriptor and sets no signal handler."""
    code = """
import os, signal, threading, multiprocessing
def state():
    fds = sorted(os.listdir("/proc/self/fd"))
    return len(fds), threading.active_count(), [signal.getsignal(s) for s in range(1, 32)]
before = state()
import jobserver
print(state() == before, multiprocessing.get_start_method(allow_none=True))
"""

    assert alone(code) == ["True", "None"]


@pytest.mark.contract("P2")
def test_metadata_promises_what_the_contract_does(metadata: Message) -> None:
    """The distribution needs nothing at run time, runs on 3.9 to 3.14, and tells its licence."""
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 15)}

    assert metadata["Name"] == "jobserver"
    assert metadata["Version"] == jobserver.__version__
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata.get_all("Requires-Dist") is None
    assert metadata["License-Expression"] == "Apache-2.0"
    assert versions <= set(metadata.get_all("Classifier", []))


@pytest.mark.contract("P3")
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel has each source file, the mark that says it is typed, and the licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    sources = {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }

    assert names - info == sources
    assert "jobserver/py.typed" in sources
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_sdist_holds_what_is_needed_to_work_on_it(tmp_path: Path) -> None:
    """The source distribution has the sources, tests, examples and documentation, and no debris."""
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "docs/conf.py",
        "examples/archive_report.py",
        "src/jobserver/__init__.py",
        "tests/conftest.py",
    } <= names
    assert not [name for name in names if name.startswith((".venv", "build/")) or ".pyc" in name]


def test_every_python_file_has_the_notice() -> None:
    """Each Python file begins with the licence and whose copyright it is."""
    notice = re.compile(
        r"(#!.*\n)?# SPDX-License-Identifier: Apache-2\.0\n# Copyright The jobserver authors\n"
    )
    folders = ["src", "tests", "examples", "tools", "docs", "benchmarks"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]

    assert files
    assert [str(path) for path in files if not notice.match(path.read_text())] == []


def test_imports_form_no_cycle() -> None:
    """No module of the package needs, at import, a module that needs it."""
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    edges = {name: top_level_imports(path, set(paths)) for name, path in paths.items()}

    # What imports nothing that is left can go; a cycle never can.
    while free := {name for name, needs in edges.items() if not needs & set(edges)}:
        edges = {name: needs for name, needs in edges.items() if name not in free}

    assert edges == {}
