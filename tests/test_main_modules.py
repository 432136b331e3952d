# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Every way in which a program may be started: script, -c, -m, stdin, with and without a guard."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

import pytest
from helpers import run_program
from marks import by_method

if TYPE_CHECKING:
    from pathlib import Path

GUARDED = """
import os, sys
from jobserver import Jobserver

os.write(1, b"imported\\n")
CONSTANT = 41

class Box:
    def __init__(self, value):
        self.value = value

def job(box):
    return Box(box.value + CONSTANT + (os.getpid() == PID))

PID = os.getpid() if __name__ == "__main__" else 0

if __name__ == "__main__":
    with Jobserver(METHOD, 2) as js:
        futures = [js.submit(job, args=(Box(n),)) for n in range(3)]
        print([future.result().value for future in futures])
"""


def imports(method: str) -> int:
    """How often the main module is imported for three jobs under each start method."""
    return {"fork": 1, "spawn": 4, "forkserver": 2}[method]


@pytest.mark.contract("J2", "S2")
@by_method("folder", ["with a blank", "plain", "ünïcode"])
def test_script(method: str, tmp_path: Path, folder: str) -> None:
    """Functions and classes of a script work in jobs; the server imports the script only once."""
    script = tmp_path / folder / "program.py"
    script.parent.mkdir()
    script.write_text(GUARDED.replace("METHOD", repr(method)))

    done = run_program([str(script)])

    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["[41, 42, 43]"] + ["imported"] * imports(method)


@pytest.mark.contract("J2", "S2")
def test_script_by_relative_path(method: str, tmp_path: Path) -> None:
    """A script that was started by a relative path and then changed directory is found."""
    script = tmp_path / "program.py"
    text = GUARDED.replace("METHOD", repr(method))
    script.write_text(text.replace("    with Job", "    os.chdir('/')\n    with Job"))

    done = run_program(["program.py"], cwd=tmp_path)

    assert done.stderr == ""
    assert "[41, 42, 43]" in done.stdout


@pytest.mark.contract("J2", "S2")
def test_module(method: str, tmp_path: Path) -> None:
    """python -m module works, with relative imports inside a package too."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sibling.py").write_text("VALUE = 1\n")
    text = "from .sibling import VALUE\n" + GUARDED.replace("METHOD", repr(method))
    (package / "program.py").write_text(text)

    done = run_program(["-m", "package.program"], cwd=tmp_path)

    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["[41, 42, 43]"] + ["imported"] * imports(method)


@pytest.mark.contract("J2", "S2")
def test_package_with_main(method: str, tmp_path: Path) -> None:
    """python -m package runs package/__main__.py, whose imports serve the jobs."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "work.py").write_text("def job(n):\n    return n * 2\n")
    (package / "__main__.py").write_text(
        textwrap.dedent(
            f"""
            from jobserver import Jobserver
            from .work import job

            if __name__ == "__main__":
                with Jobserver({method!r}, 2) as js:
                    print(list(js.map(job, [(n,) for n in range(3)])))
            """
        )
    )

    done = run_program(["-m", "package"], cwd=tmp_path)

    assert (done.stdout, done.stderr) == ("[0, 2, 4]\n", "")


@pytest.mark.contract("J2", "S2")
def test_directory_as_program(method: str, tmp_path: Path) -> None:
    """python directory/ runs its __main__.py."""
    (tmp_path / "work.py").write_text("def job(n):\n    return n * 2\n")
    (tmp_path / "__main__.py").write_text(
        f"from jobserver import Jobserver\nfrom work import job\n"
        f"if __name__ == '__main__':\n"
        f"    print(Jobserver({method!r}, 1).map(job, [(4,)]).__next__())\n"
    )

    done = run_program([str(tmp_path)])

    assert (done.stdout, done.stderr) == ("8\n", "")


SHORT = """
from jobserver import Jobserver
import math
with Jobserver(METHOD, 1) as js:
    print(js.submit(math.factorial, args=(5,)).result())
"""


@pytest.mark.contract("J2", "S2")
def test_command_string(method: str) -> None:
    """python -c works without a guard: there is no file that a worker could import."""
    done = run_program(["-c", SHORT.replace("METHOD", repr(method))])

    assert (done.stdout, done.stderr) == ("120\n", "")


@pytest.mark.contract("J2", "S2")
def test_standard_input(method: str) -> None:
    """A program read from stdin works like -c."""
    done = run_program(["-"], stdin=SHORT.replace("METHOD", repr(method)))

    assert (done.stdout, done.stderr) == ("120\n", "")


@pytest.mark.contract("J2", "S2")
def test_interactive(method: str) -> None:
    """An interactive session, whose main module has no file, works like -c."""
    session = (
        "from jobserver import Jobserver\n"
        f"js = Jobserver({method!r}, 1)\n"
        "print(js.submit(len, args=('four',)).result() + 38)\n"
    )

    done = run_program(["-i", "-q"], stdin=session)

    assert "42" in done.stdout.splitlines()
    assert "Traceback" not in done.stderr


OWN_FUNCTION = """
from jobserver import Jobserver
def job():
    return 7
js = Jobserver(METHOD, 1)
try:
    print(js.submit(job).result(20))
except Exception as error:
    print(type(error).__name__, "__main__" in str(error) and "job" in str(error))
print(js.submit(len, args=("ab",)).result(20))
"""


@pytest.mark.contract("S2", "S18")
@pytest.mark.parametrize("how", ["-c", "-"])
def test_functions_of_a_main_without_file(method: str, how: str) -> None:
    """A function that a worker cannot import works under fork; else the error names it."""
    text = OWN_FUNCTION.replace("METHOD", repr(method))

    done = run_program(["-c", text] if how == "-c" else ["-"], stdin=text if how == "-" else None)

    first, second = done.stdout.splitlines()
    assert second == "2"
    assert done.stderr == ""
    if method == "fork":
        assert first == "7"
    else:
        assert first.endswith(" True")


@pytest.mark.contract("J2", "S2")
def test_notebook(method: str, tmp_path: Path) -> None:
    """A main module as in a notebook: made by hand, without file, spec and loader."""
    cell = SHORT.replace("METHOD", repr(method)) + "print(js)\n"
    script = tmp_path / "kernel.py"
    script.write_text(
        "import sys, types\n"
        "main = types.ModuleType('__main__')\n"
        "sys.modules['__main__'] = main\n"
        f"exec(compile({cell!r}, '<cell 1>', 'exec'), main.__dict__)\n"
    )

    done = run_program([str(script)])

    assert done.stdout.splitlines()[0] == "120"
    assert done.stderr == ""


UNGUARDED = """
import os
from jobserver import Jobserver
js = Jobserver(METHOD, 2)
futures = [js.submit(os.getpid) for _ in range(2)]
print(len({future.result(20) for future in futures}))
"""


@pytest.mark.contract("J2", "S2")
def test_script_without_guard_under_fork(tmp_path: Path) -> None:
    """Under fork no worker imports the script, so none needs a guard."""
    script = tmp_path / "program.py"
    script.write_text(UNGUARDED.replace("METHOD", "'fork'"))

    done = run_program([str(script)])

    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.contract("J2", "S18")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_script_without_guard(method: str, tmp_path: Path) -> None:
    """Elsewhere the error says what is missing, once, and the program ends."""
    script = tmp_path / "program.py"
    script.write_text(UNGUARDED.replace("METHOD", repr(method)))

    done = run_program([str(script)], timeout=50)

    assert done.returncode == 1
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if '__name__ == "__main__"' in line]
    assert len(said) == 1
    assert len(done.stderr.splitlines()) < 60


@pytest.mark.contract("J2", "S18")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_main_module_that_fails_in_workers(method: str, tmp_path: Path) -> None:
    """When the script cannot be imported in a worker, the Future says why; nothing hangs."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os\n"
        "from jobserver import Jobserver\n"
        "if __name__ != '__main__':\n"
        "    raise LookupError('cannot be imported')\n"
        "import traceback\n"
        f"js = Jobserver({method!r}, 1)\n"
        "try:\n"
        "    js.submit(len, args=('ab',)).result(20)\n"
        "except Exception as error:\n"
        "    print('cannot be imported' in ''.join(traceback.format_exc()))\n"
    )

    done = run_program([str(script)])

    assert done.stdout == "True\n"
    assert done.returncode == 0


@pytest.mark.contract("J2", "S2")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_main_module_that_starts_a_thread(method: str, tmp_path: Path) -> None:
    """A script whose import leaves a thread running can be used all the same."""
    script = tmp_path / "program.py"
    script.write_text(
        "import threading, time\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        + GUARDED.replace("METHOD", repr(method))
    )

    done = run_program([str(script)])

    assert "[41, 42, 43]" in done.stdout.splitlines()
    assert done.returncode == 0


@pytest.mark.contract("J2", "S2")
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_arguments_and_flags_of_the_program(method: str, tmp_path: Path) -> None:
    """Workers see the program's sys.argv, sys.path and interpreter flags."""
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "only_here.py").write_text("VALUE = 5\n")
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\n"
        "from jobserver import Jobserver\n"
        "def job():\n"
        "    import only_here\n"
        "    return sys.argv[1:], only_here.VALUE, sys.flags.dont_write_bytecode, sys.warnoptions\n"
        "if __name__ == '__main__':\n"
        f"    sys.path.append({os.fspath(tmp_path / 'extra')!r})\n"
        f"    print(Jobserver({method!r}, 1).submit(job).result(20))\n"
    )

    done = run_program(["-B", "-W", "ignore", str(script), "one", "two"])

    assert done.stdout == "(['one', 'two'], 5, 1, ['ignore'])\n"
    assert done.stderr == ""
