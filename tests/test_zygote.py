# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The zygote of the start method forkserver: one for each tree, and gone when its owner is."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from helpers import (
    PATIENCE,
    Gate,
    await_end,
    has_ended,
    open_fds,
    run_program,
    started_program,
    wait_until,
)

from jobserver import Jobserver

if TYPE_CHECKING:
    from pathlib import Path

HEAD = """\
import json, os, resource, signal, sys, threading, time
from helpers import open_fds
from jobserver import Jobserver, SubmissionDied

def note(path):
    with open(path, "a") as stream:
        stream.write(f"{os.getpid()}\\n")

def parents(js, depth):
    below = js.submit(parents, args=(js, depth - 1)).result() if depth else []
    return [os.getppid(), *below]

def free(js):
    return js._shared.slots.free()

"""


def program(directory: Path, main: str, top: str = "") -> str:
    """Write a program whose main part is guarded; its path."""
    path = directory / "program.py"
    body = "".join(f"    {line}\n" for line in main.strip().splitlines())
    path.write_text(f'{HEAD}{top}\nif __name__ == "__main__":\n{body}')
    return str(path)


def said(directory: Path, main: str, top: str = "") -> Any:
    """Run a program to its end; what it has printed as JSON."""
    done = run_program([program(directory, main, top)])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


# One for a tree


@pytest.mark.contract("J2", "H6")
def test_one_zygote_for_a_tree(tmp_path: Path) -> None:
    """Jobs of every Jobserver and at every depth are forked by the same process, one of ours."""
    zygotes, me, others = said(
        tmp_path,
        """
js, other = Jobserver("forkserver", 3), Jobserver("forkserver", 1)
found = js.submit(parents, args=(js, 3)).result() + other.submit(parents, args=(other, 1)).result()
print(json.dumps([found, os.getpid(), Jobserver("fork", 1).submit(os.getppid).result()]))
""",
    )

    assert len(zygotes) == 6
    assert len(set(zygotes)) == 1
    assert zygotes[0] != me
    assert others == me


@pytest.mark.contract("J2")
def test_main_is_imported_once(tmp_path: Path) -> None:
    """The main module is imported in the program and in its zygote, by no job."""
    log = tmp_path / "log"
    zygote = said(
        tmp_path,
        """
js = Jobserver("forkserver", 2)
found = [js.submit(parents, args=(js, 2)).result() for _ in range(3)]
print(json.dumps(found[0][0]))
""",
        f"note({str(log)!r})",
    )

    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2
    assert pids[1] == zygote


@pytest.mark.contract("J2")
@pytest.mark.parametrize("daemon", [True, False])
def test_main_that_starts_a_process(tmp_path: Path, daemon: bool) -> None:
    """A process that importing main has started is neither waited for nor ended by the zygote."""
    started = said(
        tmp_path,
        """
js = Jobserver("forkserver", 2)
found = js.submit(helper_state).result(60)
released.set()
os.kill(found[0], signal.SIGKILL)
print(json.dumps(found))
""",
        f"""\
import multiprocessing
from helpers import process_state
context = multiprocessing.get_context("fork")
released = context.Event()

def helper_state():
    import __mp_main__ as main
    return [main.helper.pid, process_state(main.helper.pid)]

helper = context.Process(target=released.wait, args=(600,), daemon={daemon})
helper.start()
""",
    )

    assert started[1] in ("S", "R", "D")


@pytest.mark.contract("J2")
def test_main_that_leaves_a_thread(tmp_path: Path) -> None:
    """If the main module starts a thread it is imported in each job, as no fork is safe there."""
    log = tmp_path / "log"
    jobs = said(
        tmp_path,
        """
js = Jobserver("forkserver", 2)
print(json.dumps(js.submit(parents, args=(js, 2)).result()))
""",
        f"note({str(log)!r})\nthreading.Thread(target=threading.Event().wait, daemon=True).start()",
    )

    pids = [int(line) for line in log.read_text().split()]
    # The program, the zygote that has tried, and three jobs.
    assert len(pids) == len(set(pids)) == 5
    assert len(set(jobs)) == 1
    assert jobs[0] not in pids


def test_zygote_has_one_thread(tmp_path: Path) -> None:
    """What forks has one thread, and listens at no address."""
    threads, sockets = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
zygote = js.submit(os.getppid).result()
status = open(f"/proc/{zygote}/status").read()
inodes = {what[8:-1] for what in open_fds(zygote).values() if what.startswith("socket:")}
unix = [line.split() for line in open("/proc/net/unix")]
named = [line for line in unix if line[6] in inodes and len(line) > 7]
print(json.dumps([status.partition("Threads:")[2].split()[0], named]))
""",
    )

    assert threads == "1"
    assert sockets == []


def kinds(fds: dict[int, str]) -> Counter[str]:
    """What sorts of descriptors there are, numbers and names left out."""
    return Counter(re.sub(r":\[\d+\]|\d+", "", what) for what in fds.values())


@pytest.mark.contract("S18")
def test_workers_get_only_what_is_theirs(gate: Gate) -> None:
    """A worker has none of the zygote's descriptors, and none of its siblings'."""
    with Jobserver("forkserver", 6) as js:
        alone = js.submit(open_fds).result(PATIENCE)
        futures = [js.submit(gate.enter) for _ in range(4)]
        gate.await_entered(4)
        among = js.submit(open_fds).result(PATIENCE)
        gate.open()
        for future in futures:
            future.result(PATIENCE)
        after = js.submit(open_fds).result(PATIENCE)

    assert kinds(among) == kinds(alone)
    assert kinds(after) == kinds(alone)
    assert not any("eventpoll" in what for what in alone.values())


# Its end


@pytest.mark.contract("H14")
def test_zygote_ends_with_the_program(tmp_path: Path) -> None:
    """When the program has ended its zygote ends, too."""
    zygote = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
print(json.dumps(js.submit(os.getppid).result()))
""",
    )
    await_end(zygote)


WITH_A_JOB = """
js = Jobserver("forkserver", 2)
zygote = js.submit(os.getppid).result()
job = js.submit(time.sleep, args=(60,))
print(json.dumps([zygote, int(repr(job).rpartition("pid=")[2][:-1])]), flush=True)
job.result()
"""


def test_zygote_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    """SIGKILL of the program ends the zygote, also while a job runs; the job runs on."""
    with started_program([program(tmp_path, WITH_A_JOB)]) as process:
        assert process.stdout is not None
        zygote, job = json.loads(process.stdout.readline())
        assert not has_ended(zygote)
        process.send_signal(signal.SIGKILL)

        await_end(zygote)

        assert not has_ended(job)


def test_zygote_outlives_an_interrupt(tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group; the zygote leaves it to the program and its jobs."""
    result = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
zygote = js.submit(os.getppid).result()
os.kill(zygote, signal.SIGINT)
print(json.dumps(js.submit(os.getppid).result() == zygote))
""",
    )
    assert result is True


INTERRUPTED = """
js = Jobserver("forkserver", 1)
try:
    js.submit(os.getpid)
except KeyboardInterrupt:
    print("interrupted", flush=True)
print(js.submit(os.getppid).result() != os.getpid(), free(js))
"""

#: Main's import goes on for ever, when it is imported for the first time by a zygote.
ENDLESS = """
if __name__ != "__main__" and not os.path.exists({path!r}):
    note({path!r})
    time.sleep(600)
"""


@pytest.mark.contract("S18", "F22")
def test_interrupt_while_main_is_imported(tmp_path: Path) -> None:
    """Ctrl-C ends a zygote that has not been ready yet, and so the waiting for it."""
    log = tmp_path / "log"
    path = program(tmp_path, INTERRUPTED, ENDLESS.format(path=str(log)))
    with started_program([path]) as process:
        wait_until(log.exists, "main to be imported")
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)

    assert (out.splitlines(), err) == (["interrupted", "True 1"], "")


# When it is killed


@pytest.mark.contract("F9", "F26")
def test_killed_zygote_is_replaced(tmp_path: Path) -> None:
    """The next job starts a new zygote; jobs of the old one are accounted for as before."""
    found = said(
        tmp_path,
        """
js = Jobserver("forkserver", 3)
old = js.submit(os.getppid).result()
good = js.submit(time.sleep, args=(0.3,))
bad = js.submit(time.sleep, args=(60,))
os.kill(old, signal.SIGKILL)
new = js.submit(os.getppid).result(10)
answer = [old != new, good.result(10), free(js)]
try:
    bad.wait(10, signal=signal.SIGKILL)
    bad.result(0)
except SubmissionDied as died:
    answer.append(died.exitcode)
print(json.dumps([*answer, free(js), js.submit(os.getppid).result(10) == new]))
""",
    )

    # Nobody is left to tell how a job of the old zygote has ended: None, rather than a guess.
    assert found == [True, None, 2, None, 3, True]


@pytest.mark.contract("H6")
def test_zygote_killed_amid_a_tree(tmp_path: Path) -> None:
    """A job that submits when the zygote is gone starts one of its own, which ends with it."""
    found = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
old, nested, used = js.submit(kill_zygote, args=(js,)).result(20)
print(json.dumps([old, nested, used, js.submit(os.getppid).result(20), free(js)]))
""",
        """
def kill_zygote(js):
    zygote = os.getppid()
    os.kill(zygote, signal.SIGKILL)
    while os.getppid() == zygote:
        time.sleep(0.005)
    return [zygote, js.submit(os.getppid).result(), js.submit(os.getppid).result()]
""",
    )

    old, nested, used, outer, free = found
    assert nested == used
    assert len({old, nested, outer}) == 3
    assert free == 1
    for zygote in (old, nested, outer):
        await_end(zygote)


@pytest.mark.contract("S18")
def test_exit_statuses_are_not_hoarded(tmp_path: Path) -> None:
    """Of jobs that end with a status other than 0, nothing is left in the program."""
    assert said(
        tmp_path,
        """
from jobserver._launch._zygote import client
js = Jobserver("forkserver", 2)
for future in [js.submit(sys.exit, args=(3,)) for _ in range(20)]:
    future.wait()
for _ in range(2):
    js.submit(os.getpid).result()
with js:
    pass
print(json.dumps([len(client()._awaited), len(client()._exits)]))
""",
    ) == [0, 0]


@pytest.mark.contract("S18")
def test_zygote_without_descriptors(tmp_path: Path) -> None:
    """A zygote that has no descriptor left refuses with OSError, and works on when it has some."""
    found = said(
        tmp_path,
        """
js = Jobserver("forkserver", 8)
zygote = js.submit(os.getppid).result()
lowest = next(n for n in range(100) if n not in open_fds(zygote))
before = len(open_fds(zygote))
refused = 0
for room in range(4):
    resource.prlimit(zygote, resource.RLIMIT_NOFILE, (lowest + room, 1000))
    futures = []
    try:
        for _ in range(6):
            futures.append(js.submit(time.sleep, args=(60,)))
    except OSError:
        refused += 1
    resource.prlimit(zygote, resource.RLIMIT_NOFILE, (1000, 1000))
    for future in futures:
        future.wait(10, signal=signal.SIGKILL)
    assert js.submit(os.getppid).result(10) == zygote
deadline = time.monotonic() + 10
while len(open_fds(zygote)) > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(json.dumps([refused, free(js), len(open_fds(zygote)) - before]))
""",
    )

    refused, free, surplus = found
    assert (refused, free) == (4, 8)
    assert surplus <= 0


@pytest.mark.contract("S2")
def test_failing_import_of_main_is_told(tmp_path: Path) -> None:
    """A main module that cannot be imported again fails the jobs, with its traceback."""
    found = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
text = []
for _ in range(2):
    try:
        js.submit(os.getpid).result(20)
    except Exception as error:
        text.append(str(error))
print(json.dumps([text, free(js)]))
""",
        'if __name__ != "__main__":\n    raise LookupError("not twice")',
    )

    assert len(found[0]) == 2
    assert all("LookupError: not twice" in text for text in found[0])
    assert found[1] == 1


def test_changes_since_the_start_reach_later_jobs(tmp_path: Path) -> None:
    """What the program changes after the zygote has started holds for the jobs that follow."""
    found = said(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
first = js.submit(look).result()
os.environ["JOBSERVER_T"] = "changed"
os.chdir("/")
sys.argv[1:] = ["more"]
print(json.dumps([first, js.submit(look).result(), os.getcwd()]))
""",
        """
def look():
    return [os.environ.get("JOBSERVER_T"), os.getcwd(), sys.argv[1:]]
""",
    )

    assert found[0] == [None, os.getcwd(), []]
    assert found[1] == ["changed", "/", ["more"]]


@pytest.mark.fresh("waits for workers to end")
def test_zygote_reaps_its_workers(gate: Gate) -> None:
    """No worker stays a zombie of the zygote, whether it answered or was killed."""
    with Jobserver("forkserver", 2) as js:
        zygote = js.submit(os.getppid).result(PATIENCE)
        good = js.submit(gate.enter)
        bad = js.submit(gate.enter)
        pids = gate.await_entered(2)
        bad.wait(PATIENCE, signal=signal.SIGKILL)
        gate.open()
        good.result(PATIENCE)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "reaping")
        assert not has_ended(zygote)


@pytest.mark.contract("J2", "S2")
def test_killed_tracker_is_replaced_before_a_job(tmp_path: Path) -> None:
    """A job gets a resource tracker that lives: its own would unlink what it returns."""
    path = program(
        tmp_path,
        """
js = Jobserver("forkserver", 1)
js.submit(tracker_pipe).result()
old = resource_tracker._resource_tracker._pid
os.kill(old, signal.SIGKILL)
await_end(old)
print(js.submit(tracker_pipe).result() == tracker_pipe())
""",
        """\
from multiprocessing import resource_tracker
from helpers import await_end
from jobs_shared import tracker_pipe
""",
    )
    done = run_program(["-W", "ignore", path])
    assert done.stdout == "True\n", done.stderr


def test_what_is_to_be_preloaded_is(tmp_path: Path) -> None:
    """A module named to ``set_forkserver_preload`` is imported once, not by each worker."""
    (tmp_path / "heavy.py").write_text("import os\nos.write(1, b'imported\\n')\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, sys\n"
        "from jobserver import Jobserver\n\n"
        "def loaded():\n"
        "    return 'heavy' in sys.modules\n\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('forkserver')\n"
        "    context.set_forkserver_preload(['heavy', 'no_such'])\n"
        "    with Jobserver('forkserver', 2) as js:\n"
        "        print([js.submit(loaded).result() for _ in range(3)], 'heavy' in sys.modules)\n"
    )
    done = run_program([str(program)])
    assert done.stderr == ""
    assert sorted(done.stdout.splitlines()) == ["[True, True, True] False", "imported"]
