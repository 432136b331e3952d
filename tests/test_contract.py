# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The contract as a whole: its public names, its documentation, and a test for each clause."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from helpers import run_program

import jobserver

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "contract.md"
NAMES = [
    "Blocked",
    "CallbackRaised",
    "Future",
    "Jobserver",
    "JobserverExecutor",
    "SubmissionDied",
    "__version__",
]


def clauses() -> list[str]:
    """The ids that docs/contract.md gives, in its order."""
    return re.findall(r"^- \*\*([A-Z]\d+)\*\* ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def markers() -> Iterator[tuple[str, str]]:
    """Each clause named by a test, and where."""
    for path in sorted(TESTS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.contract":
                for argument in node.args:
                    value = ast.literal_eval(argument)
                    yield value, f"{path.name}:{node.lineno}"


def test_clauses_are_distinct() -> None:
    """Each clause of the contract has an id of its own."""
    counts = Counter(clauses())

    assert len(counts) > 100
    assert [clause for clause, count in counts.items() if count > 1] == []


def test_every_clause_has_a_test() -> None:
    """Each clause of the contract is guarded by at least one test."""
    guarded = {clause for clause, _ in markers()}

    assert [clause for clause in clauses() if clause not in guarded] == []


def test_every_marker_names_a_clause() -> None:
    """No test claims to guard a clause that the contract does not have."""
    known = set(clauses())

    assert [f"{where}: {clause}" for clause, where in markers() if clause not in known] == []


@pytest.mark.contract("P1")
def test_public_names() -> None:
    """The package offers exactly the public names of the contract."""
    assert sorted(jobserver.__all__) == NAMES
    for name in NAMES:
        assert hasattr(jobserver, name)
    starred: dict[str, Any] = {}
    exec("from jobserver import *", starred)
    assert set(starred) - {"__builtins__"} == set(NAMES)


@pytest.mark.contract("P1")
def test_version() -> None:
    """__version__ is a version."""
    assert re.fullmatch(r"\d+(\.\d+)*([ab]|rc|\.dev|\.post)?\d*(\+.*)?", jobserver.__version__)


@pytest.mark.contract("P1")
def test_exceptions() -> None:
    """Blocked, CallbackRaised and SubmissionDied are Exceptions of their own."""
    kinds = [jobserver.Blocked, jobserver.CallbackRaised, jobserver.SubmissionDied]
    for kind in kinds:
        assert issubclass(kind, Exception)
        assert [other for other in kinds if issubclass(kind, other)] == [kind]


@pytest.mark.contract("P2")
def test_only_the_standard_library() -> None:
    """Importing and using the package loads nothing but the standard library."""
    program = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import jobserver\n"
        "for method in ('fork', 'spawn', 'forkserver'):\n"
        "    assert jobserver.Jobserver(method, 1).submit(len, args=('ab',)).result() == 2\n"
        "jobserver.JobserverExecutor\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(loaded - {'jobserver', '__mp_main__'})\n"
    )
    names = (
        set(sys.stdlib_module_names)
        if sys.version_info >= (3, 10)
        else {path.stem for path in Path(ast.__file__).parent.iterdir()}
        | set(sys.builtin_module_names)
    )

    done = run_program(["-c", program])

    assert done.stderr == ""
    foreign = {name for name in ast.literal_eval(done.stdout) if name not in names}
    assert {name for name in foreign if not _is_extension_of_the_library(name)} == set()


def _is_extension_of_the_library(name: str) -> bool:
    """Whether a module comes with the interpreter, as one of its shared libraries."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    return spec is not None and "lib-dynload" in str(spec.origin)


@pytest.mark.contract("P2")
def test_versions_of_python() -> None:
    """The package says that it runs on Python 3.9 and later, without dependencies."""
    text = (TESTS.parent / "pyproject.toml").read_text(encoding="utf-8")

    assert 'requires-python = ">=3.9"' in text
    assert "\ndependencies = []\n" in text
    for minor in range(9, 15):
        assert f"Python :: 3.{minor}" in text


def public_things() -> Iterator[tuple[str, Any]]:
    """Public classes, their public methods and properties."""
    for name in NAMES[:-1]:
        kind = getattr(jobserver, name)
        yield name, kind
        ours = [base for base in kind.__mro__ if base.__module__.startswith("jobserver")]
        for attribute, value in [item for base in ours for item in vars(base).items()]:
            if attribute.startswith("_") and attribute != "__call__":
                continue
            if inspect.isfunction(value) or isinstance(value, (property, classmethod)):
                yield f"{name}.{attribute}", value


@pytest.mark.contract("P3")
@pytest.mark.parametrize(
    ("name", "thing"), list(public_things()), ids=lambda value: str(value)[:40]
)
def test_everything_is_documented(name: str, thing: Any) -> None:
    """Each public class, method and property has a docstring with substance."""
    text = inspect.getdoc(thing) or ""

    assert len(text.split()) >= 3, name


@pytest.mark.contract("P3")
def test_everything_is_typed() -> None:
    """Each parameter and result of the public methods is annotated, and the package says so."""
    bare = []
    for name, thing in public_things():
        if not inspect.isfunction(thing):
            continue
        signature = inspect.signature(thing)
        bare += [
            f"{name}({parameter.name})"
            for parameter in list(signature.parameters.values())[1:]
            if parameter.annotation is inspect.Parameter.empty
        ]
        if signature.return_annotation is inspect.Signature.empty:
            bare.append(f"{name} ->")

    assert bare == []
    assert (Path(jobserver.__file__).parent / "py.typed").exists()


@pytest.mark.contract("P3")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("submit", ["Blocked", "CallbackRaised", "seconds", "slot", "RuntimeError"]),
        ("map", ["order", "seconds", "TimeoutError", "chunksize", "buffersize"]),
        ("replace", ["slots"]),
        ("reclaim_resources", ["callbacks"]),
    ],
)
def test_docstrings_tell_units_and_errors(name: str, words: list[str]) -> None:
    """The docstrings say what a caller must know: units, errors, order."""
    text = inspect.getdoc(getattr(jobserver.Jobserver, name)) or ""

    assert [word for word in words if word not in text] == []
