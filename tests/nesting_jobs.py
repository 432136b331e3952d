# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Jobs that submit jobs, and an honest account of which of them ran when.

The account is a file to which every process appends: one write for each line, so its order is the
order in which things happened. A job writes ``+`` when it runs and ``-`` when it does not: from the
first instruction of its function to the last one, less the time inside those calls of ours in
which it may have lent its slot. What is counted as running is therefore running for certain.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

from helpers import PATIENCE, has_ended, wait_until

from jobserver import Blocked, CallbackRaised, SubmissionDied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jobserver import Future, Jobserver


class Line(NamedTuple):
    """What one process has noted."""

    pid: int
    name: str
    event: str  # start, end, + (runs), - (may have lent its slot), or anything else


class Account:
    """The file; travels to jobs as an argument."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        Path(path).touch()

    def note(self, name: object, event: str) -> None:
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"{os.getpid()} {name} {event}\n".encode())
        finally:
            os.close(fd)

    def lines(self) -> list[Line]:
        found = []
        for line in Path(self.path).read_text().splitlines():
            pid, name, event = line.split(maxsplit=2)
            found.append(Line(int(pid), name, event))
        return found

    def events(self, event: str) -> list[str]:
        """The names of those who have noted an event, in order."""
        return [line.name for line in self.lines() if line.event == event]

    def peak(self) -> int:
        """The largest number of jobs that were running at the same time."""
        now = most = 0
        for line in self.lines():
            now += (line.event == "+") - (line.event == "-")
            most = max(most, now)
        assert now == 0, "some job has not noted that it ends"
        return most

    def pids(self) -> set[int]:
        return {line.pid for line in self.lines()}

    def await_ends(self) -> None:
        """Wait for all that was submitted and all that has noted anything, orphans too."""
        wait_until(lambda: set(self.events("submitted")) <= set(self.events("end")), "orphans")
        for pid in self.pids() - {os.getpid()}:
            wait_until(lambda pid=pid: has_ended(pid), f"process {pid} to end")  # type: ignore[misc]

    @contextlib.contextmanager
    def running(self, name: object) -> Iterator[None]:
        """A job's body."""
        self.note(name, "+")
        try:
            yield
        finally:
            self.note(name, "-")

    @contextlib.contextmanager
    def away(self, name: object) -> Iterator[None]:
        """A call during which the job may have lent its slot."""
        self.note(name, "-")
        try:
            yield
        finally:
            self.note(name, "+")


# Random trees


class Node(NamedTuple):
    """One job of a random tree."""

    name: int
    kids: tuple[Node, ...] = ()
    consume: int = 1
    submit_timeout: Optional[float] = None
    lend: bool = False  # of the handle that it is submitted through
    wait: str = "result"  # result, wait, done, timed, dropped: what its parent does about it
    callback: Optional[Node] = None  # submitted when it is done, by its parent
    order: str = "batch"  # chain: each child is waited for before the next; map: Jobserver.map
    end: str = "value"  # value, raise, exit, kill (after its children), orphan (before them)


def size(node: Node) -> int:
    """How many jobs there are in a tree."""
    return 1 + sum(map(size, node.kids)) + (size(node.callback) if node.callback else 0)


def every(node: Node) -> Iterator[Node]:
    """All jobs of a tree."""
    yield node
    for kid in node.kids:
        yield from every(kid)
    if node.callback:
        yield from every(node.callback)


class Failed(Exception):
    """What a job with end="raise" raises: it has its report."""


class Report(NamedTuple):
    """What a job has to say: what became of its children."""

    name: int
    kids: dict[int, Any]


#: How long a finite timeout of a random tree is. Long enough for a free slot to be taken.
SHORT = 0.05


class Grower:
    """The job function of a random tree; has what all its jobs need."""

    def __init__(self, js: Jobserver, account: Account) -> None:
        self.js = js
        self.account = account

    def __call__(self, node: Node) -> Report:
        # When a test has waited long enough, it asks everybody where he stands.
        stream = open(f"{self.account.path}.stack.{os.getpid()}", "w")  # noqa: SIM115
        faulthandler.register(signal.SIGUSR1, file=stream, all_threads=True)
        self.account.note(node.name, "start")
        return _Run(self, node).run()


class _Run:
    """One job that runs."""

    def __init__(self, grower: Grower, node: Node) -> None:
        self.grower = grower
        self.account = grower.account
        self.node = node
        self.futures: dict[int, Future[Report]] = {}
        self.nodes: dict[int, Node] = {}
        self.outcomes: dict[int, Any] = {}
        # How many of our calls it is in, one in another when a callback makes one.
        self.inside = 0
        self.counts = bool(node.consume)

    def run(self) -> Report:
        if self.counts:
            self.account.note(self.node.name, "+")
        for kid in () if self.node.order == "map" else self.node.kids:
            self.submit(kid)
            if self.node.order == "chain":
                self.wait(kid.name)
        if self.node.end == "orphan":
            self.leave("end")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.node.order == "map":
            self.map()
        # Callbacks add to the futures while these are waited for.
        while any(name not in self.outcomes for name in self.futures):
            for name in list(self.futures):
                if name not in self.outcomes:
                    self.wait(name)
        return self.finish()

    def finish(self) -> Report:
        self.leave("end")
        report = Report(self.node.name, self.outcomes)
        if self.node.end == "raise":
            raise Failed(report)
        if self.node.end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.node.end == "exit":
            os._exit(3)
        return report

    def leave(self, event: str) -> None:
        if self.counts:
            self.account.note(self.node.name, "-")
        self.account.note(self.node.name, event)
        self.inside = 1  # from now on only callbacks run

    @contextlib.contextmanager
    def library(self) -> Iterator[None]:
        """A call that may lend. A callback inside it runs, and may make such a call, too."""
        if self.counts and self.inside == 0:
            self.account.note(self.node.name, "-")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if self.counts and self.inside == 0:
                self.account.note(self.node.name, "+")

    def done(self, name: int) -> None:
        """A callback: the job holds its slot while it runs."""
        inside, self.inside = self.inside, 0
        if self.counts and inside:
            self.account.note(self.node.name, "+")
        try:
            self.account.note(name, "callback")
            follower = self.nodes[name].callback
            if follower is not None:
                self.submit(follower)
        finally:
            self.inside = inside
            if self.counts and inside:
                self.account.note(self.node.name, "-")

    def submit(self, kid: Node) -> None:
        js = self.grower.js.replace(lend=kid.lend)
        self.nodes[kid.name] = kid
        with contextlib.ExitStack() as stack:
            # A job that holds its slot for certain is counted: a timeout, and no callback inside.
            if kid.submit_timeout is None:
                stack.enter_context(self.library())
            try:
                future = js.submit(
                    self.grower, args=(kid,), consume=kid.consume, timeout=kid.submit_timeout
                )
            except Blocked:
                self.outcomes[kid.name] = "blocked"
                return
            self.account.note(kid.name, "submitted")
            self.futures[kid.name] = future
            future.when_done(self.done, kid.name)

    def wait(self, name: int) -> None:
        future = self.futures.get(name)
        if future is None:
            return
        how = self.nodes[name].wait
        if how == "dropped":
            # Nobody ever asks: the job's end waits for it.
            self.outcomes[name] = "dropped"
            return
        if how == "timed":
            with contextlib.suppress(Blocked):
                self.outcomes[name] = outcome(future, SHORT)
                return
        with self.library():
            if how == "wait":
                future.wait()
            elif how == "done":
                assert future.done(None)
            self.outcomes[name] = outcome(future, None)

    def map(self) -> None:
        kids = self.node.kids
        with self.library():
            iterator = self.grower.js.replace(lend=bool(kids and kids[0].lend)).map(
                self.grower, [(kid,) for kid in kids]
            )
            for kid in kids:
                try:
                    self.outcomes[kid.name] = ("value", next(iterator))
                except Failed as failed:
                    self.outcomes[kid.name] = ("raise", failed.args[0])
                    break
                except SubmissionDied as died:
                    self.outcomes[kid.name] = ("died", died.exitcode)
                    break


def outcome(future: Future[Report], timeout: Optional[float]) -> Any:
    """What a Future says, the same each time."""
    try:
        value: Any = ("value", future.result(timeout))
        assert future.result(0) is value[1]
    except Failed as failed:
        value = ("raise", failed.args[0])
        assert future.done()
    except SubmissionDied as died:
        value = ("died", died.exitcode)
        assert future.done()
    return value


def judge(node: Node, said: Any, account: Account) -> None:
    """Compare what became of a job with what it was told to do; then its children."""
    started = account.events("start").count(str(node.name))
    if said == "blocked":
        assert node.submit_timeout is not None
        assert not started, f"{node.name} was refused, and ran"
        return
    assert started == 1, f"{node.name} ran {started} times"
    if said == "dropped":
        return
    kind, what = said
    if node.end in ("kill", "orphan", "exit"):
        assert (kind, what) == ("died", 3 if node.end == "exit" else -signal.SIGKILL)
        return
    assert kind == node.end
    assert what.name == node.name
    expected = {kid.name: kid for kid in node.kids}
    if node.order == "map":
        # The iteration ends at the first failure.
        assert list(what.kids) == [kid.name for kid in node.kids][: len(what.kids)]
        endings = [kid.end for kid in node.kids[: len(what.kids)]]
        assert all(end == "value" for end in endings[:-1])
        assert len(what.kids) == len(node.kids) or endings[-1] != "value"
    else:
        for kid in node.kids:
            _expect_chain(kid, what, expected)
        assert set(what.kids) == set(expected)
        for name, said_of_kid in what.kids.items():
            calls = account.events("callback").count(str(name))
            assert calls == (said_of_kid != "blocked"), f"{name}: {calls} callbacks"
    for name, said_of_kid in what.kids.items():
        judge(expected[name], said_of_kid, account)


def _expect_chain(kid: Node, what: Report, expected: dict[int, Node]) -> None:
    """What a callback submits is a child, too, and may have a callback of its own."""
    while kid.callback is not None and kid.name in what.kids:
        submitted = what.kids[kid.name] not in ("blocked", "dropped")
        # The callback of a job that nobody waits for may come after the report.
        assert not submitted or kid.callback.name in what.kids
        kid = kid.callback
        if kid.name in what.kids:
            expected[kid.name] = kid


# Fixed shapes


def chain(js: Jobserver, account: Account, depth: int, timeout: Optional[float]) -> int:
    """Nest to a depth, or until there is no slot; how deep it went."""
    with account.running(depth):
        if not depth:
            return 0
        try:
            with account.away(depth) if timeout is None else contextlib.nullcontext():
                future = js.submit(chain, args=(js, account, depth - 1, timeout), timeout=timeout)
        except Blocked:
            return 0
        with account.away(depth):
            below = future.result()
        return below + 1


def fan(js: Jobserver, account: Account, width: int, depth: int) -> int:
    """A full tree: every job submits all its children, then collects; how many jobs there were."""
    name = f"{depth}"
    with account.running(name):
        if not depth:
            return 1
        futures = []
        for _ in range(width):
            with account.away(name):
                futures.append(js.submit(fan, args=(js, account, width, depth - 1)))
        with account.away(name):
            return 1 + sum(future.result() for future in futures)


def shape(js: Jobserver, tree: tuple[Any, ...]) -> str:
    """Jobs given as (name, consume, kids, end): submit all children, then wait for each."""
    name, kids, end = tree[0], tree[2], tree[3] if len(tree) > 3 else ""
    futures = [js.submit(shape, args=(js, kid), consume=kid[1]) for kid in kids]
    words = []
    for future in futures:
        try:
            words.append(future.result())
        except SubmissionDied as died:
            words.append(f"died {died.exitcode}")
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name}({','.join(words)})"


def submit_from_threads(js: Jobserver, count: int, fn: Any, args: tuple[Any, ...]) -> list[Any]:
    """Submit from several threads of one job; each waits for its own."""
    found: list[Any] = []

    def one() -> None:
        found.append(js.submit(fn, args=args).result())

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def callbacks_in_job(js: Jobserver) -> list[str]:
    """Have a callback called here."""
    seen: list[str] = []
    future = js.submit(os.getpid)
    future.when_done(seen.append, "called")
    while True:
        try:
            future.wait(PATIENCE)
            return seen
        except CallbackRaised:
            continue


# Standing at gates


class Turnstile:
    """A gate that lets one job through at a time, when the test says so."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    def enter(self, name: object) -> object:
        """Announce a name, stay until it is let through, return it."""
        Path(self.directory, f"coming.{name}").write_text(str(os.getpid()))
        os.rename(f"{self.directory}/coming.{name}", f"{self.directory}/in.{name}")
        wait_until(lambda: os.path.exists(f"{self.directory}/go.{name}"), f"{name} to go")
        return name

    def inside(self) -> list[str]:
        """Who stands there now, in no order."""
        names = os.listdir(self.directory)
        return [
            name[3:] for name in names if name.startswith("in.") and f"go.{name[3:]}" not in names
        ]

    def pid(self, name: str) -> int:
        """The process of one that has come."""
        return int(Path(self.directory, f"in.{name}").read_text())

    def been(self) -> int:
        """How many have come so far."""
        return sum(name.startswith("in.") for name in os.listdir(self.directory))

    def let(self, name: str) -> None:
        Path(self.directory, f"go.{name}").touch()


def branch(js: Jobserver, turnstile: Turnstile, width: int, depth: int, how: str, name: str) -> int:
    """A tree whose leaves, the work, stand at the turnstile; how many leaves there were."""
    if not depth:
        turnstile.enter(name)
        return 1
    calls = [(js, turnstile, width, depth - 1, how, f"{name}{n}") for n in range(width)]
    if how == "map":
        return sum(js.map(branch, calls))
    futures = [js.submit(branch, args=call) for call in calls]
    for future in futures:
        if how == "wait":
            assert future.wait()
        elif how == "done":
            assert future.done(None)
    return sum(future.result() for future in futures)


def wait_for_child(js: Jobserver, turnstile: Turnstile, how: str, timeout: Optional[float]) -> str:
    """Have a child at the turnstile, wait for it in one way, then pass the turnstile, too."""
    if how == "map":
        iterator = js.map(turnstile.enter, [("child",)], timeout=timeout)
        next(iterator)
    elif how == "end":
        js.submit(turnstile.enter, args=("child",))
        return "ended"
    else:
        future = js.submit(turnstile.enter, args=("child",))
        if how == "result":
            future.result(timeout)
        elif how == "wait":
            assert future.wait(timeout)
        else:
            assert future.done(timeout)
    turnstile.enter("parent")
    return "went on"


def wait_for_killed_child(js: Jobserver, turnstile: Turnstile) -> str:
    """Lend, to a child that is killed by the test."""
    future = js.submit(turnstile.enter, args=("child",))
    try:
        future.result()
    except SubmissionDied:
        turnstile.enter("parent")
    return "went on"


def submit_then_pass(js: Jobserver, turnstile: Turnstile) -> bool:
    """Submit a child, then say that submit has returned; whether the child had ended by then."""
    future = js.submit(turnstile.enter, args=("child",))
    ended = future.done()
    turnstile.enter("parent")
    return ended


def leave_two_children(js: Jobserver, turnstile: Turnstile) -> None:
    """Submit two and wait for neither: the job's end does."""
    for name in ("first", "second"):
        js.submit(turnstile.enter, args=(name,))


def slots_seen(js: Jobserver) -> int:
    """How many more slots a job finds free."""
    count = 0
    futures = []
    with contextlib.suppress(Blocked):
        while True:
            futures.append(js.submit(wait_until_told, args=(os.getpid(),), timeout=0))
            count += 1
    for future in futures:
        future.wait(PATIENCE, signal=signal.SIGKILL)
    return count


def wait_until_told(parent: int) -> None:
    """Stay until killed, or until the parent is gone."""
    wait_until(lambda: os.getppid() != parent and has_ended(parent))


def callback_submits(js: Jobserver) -> list[Any]:
    """In a job with the only slot: a child's callback submits a job, and has its result."""
    seen: list[Any] = []
    future = js.submit(os.getpid)
    future.when_done(lambda: seen.append(js.submit(callbacks_in_job, args=(js,)).result()))
    future.result()
    return seen


def kill_a_borrower(js: Jobserver) -> list[Any]:
    """Lend the only slot to a child that is killed; then again, and use what is left."""
    died = []
    for _ in range(3):
        try:
            js.submit(_die).result()
        except SubmissionDied as error:
            died.append(error.exitcode)
    return [*died, js.submit(sum, args=((1, 2),)).result()]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
