# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Environments: one for each package that is measured, so that none meets another."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "benchmarks" / "requirements"
ENVIRONMENTS = ROOT / ".venv-bench"
OURS = "ours"


@dataclass
class Environment:
    """An interpreter, and what is installed for it."""

    python: str
    versions: dict[str, str]
    #: Where packages are that are not installed.
    path: str = ""
    trouble: str = ""


def here(names: Iterable[str]) -> dict[str, Environment]:
    """Use this interpreter for all, and the checkout itself: nothing is made or fetched."""
    environment = Environment(sys.executable, _versions(sys.executable), str(ROOT / "src"))
    return dict.fromkeys(names, environment)


def make_all(names: Iterable[str]) -> dict[str, Environment]:
    """Make what is not there or not as it should be; one that cannot be made says why."""
    made = {}
    for name in names:
        directory = ENVIRONMENTS / name
        python = directory / "bin" / "python"
        trouble = ""
        try:
            _make(name, directory, python)
        except subprocess.CalledProcessError as error:
            trouble = f"its environment could not be made ({error})"
        versions = {} if trouble else _versions(str(python))
        made[name] = Environment(str(python), versions, trouble=trouble)
    return made


def _make(name: str, directory: Path, python: Path) -> None:
    files = [REQUIREMENTS / f"{name}.txt", REQUIREMENTS / "numpy.txt"]
    stamp = directory / ".stamp"
    wanted = _fingerprint(files, sys.version)
    if _read(stamp) != wanted:
        _tell(f"making {directory.relative_to(ROOT)}")
        _run([sys.executable, str(ROOT / "tools" / "make_venv.py"), str(directory)])
        _pip(python, "-r", str(files[0]))
        stamp.write_text(wanted)
    if name == OURS:
        _install_checkout(directory, python)


def _install_checkout(directory: Path, python: Path) -> None:
    """Install a copy: what changes in the checkout during a session does not count."""
    stamp = directory / ".stamp-checkout"
    files = sorted((ROOT / "src").rglob("*.py"))
    wanted = _fingerprint([*files, ROOT / "pyproject.toml"], "")
    if _read(stamp) != wanted:
        _tell("installing the checkout")
        _pip(python, "--no-deps", "--force-reinstall", str(ROOT))
        stamp.write_text(wanted)


def _fingerprint(files: Iterable[Path], salt: str) -> str:
    digest = hashlib.sha256(salt.encode())
    for file in files:
        digest.update(str(file).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _pip(python: Path, *arguments: str) -> None:
    quiet = ["-qq", "--disable-pip-version-check", "--no-input"]
    _run([str(python), "-m", "pip", "install", *quiet, *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, env=clean(os.environ))


def _versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform; print(json.dumps({"
        "'Python': platform.python_version(),"
        " **{d.metadata['Name']: d.version for d in m.distributions()}}))"
    )
    output = subprocess.check_output([python, "-c", code], text=True)
    found: dict[str, str] = json.loads(output)
    return {name: found[name] for name in sorted(found, key=str.lower)}


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without what would change what is measured."""
    found = dict(environ)
    # A make that runs us is not to hand its slots to what is measured; byte code is to be cached.
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH"):
        found.pop(name, None)
    # Some interpreters come without byte code, in a place that is not ours to write to.
    found.setdefault("PYTHONPYCACHEPREFIX", str(ROOT / "build" / "pycache"))
    # The threads that a numerical library starts at its import are none of the subject.
    found.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    return found


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
