# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The main program's part: submit the first job, watch the others, and leave nobody behind."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable

from archive.crew import Boss, Crew, Submission
from archive.folders import Alone, Task, perform
from archive.journal import AGAIN, RUNNING, SHOT, Reader, peak
from jobserver import Jobserver

if TYPE_CHECKING:
    from pathlib import Path

    from archive.report import Report

#: Seconds between two looks at the journal, and how long the last orphans may take to end.
GLANCE = 0.1
PATIENCE = 60.0


@dataclass(frozen=True)
class Run:
    """A report and how it was made."""

    report: Report
    seconds: float
    jobs: int = 0
    peak_running: int = 0
    killed: int = 0
    retried: int = 0


def run_alone(root: Path, on_files: Callable[[int], None]) -> Run:
    """Make the report in this process, one file after the other."""
    done = 0

    def on_file() -> None:
        nonlocal done
        done += 1
        on_files(done)

    start = time.perf_counter()
    report = perform(Task(root, is_folder=True), Alone(on_file))
    return Run(report, time.perf_counter() - start)


def run_crew(
    root: Path, context: str, slots: int, kill_some: bool, on_files: Callable[[int], None]
) -> Run:
    """Make the report with a job for each file and folder."""
    start = time.perf_counter()
    with Jobserver(context, slots, preexec_fn=end_at_interrupt, lend=True) as jobserver:
        reader = Reader()
        foreman = Foreman(Crew(jobserver, reader.path, root, kill_some), reader, on_files)
        try:
            report = foreman.report()
            seconds = time.perf_counter() - start
            foreman.await_orphans()
        except BaseException:
            foreman.stop_everyone()
            raise
        finally:
            foreman.journal.close()
            reader.close()
    return Run(
        report,
        seconds,
        jobs=len(reader.badges(RUNNING)),
        peak_running=peak(reader.intervals()),
        killed=len(reader.killed()),
        retried=len(reader.badges(AGAIN)),
    )


def end_at_interrupt() -> None:
    """Let Ctrl-C, which the terminal sends to all of us, end a worker without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Foreman(Boss):
    """The boss of the first job, who sees what all jobs note in the journal."""

    def __init__(self, crew: Crew, reader: Reader, on_files: Callable[[int], None]) -> None:
        super().__init__(crew, badge=None)
        self.reader = reader
        self.on_files = on_files

    def report(self) -> Report:
        """Have the whole tree reported."""
        first = self.start(Task(self.crew.root, is_folder=True))
        if self.crew.kill_some:
            # The first job is shot as well, when it has got something to lose.
            while not self.reader.files and not first.future.wait(GLANCE / 10):
                self.look()
            self.shoot(first)
        return self.collect(first)

    def outcome(self, submission: Submission) -> Report:
        """What the first job returns or raises; meanwhile its progress is shown."""
        while not submission.future.wait(GLANCE):
            self.look()
        return submission.future.result()

    def look(self) -> None:
        """Read the journal."""
        self.reader.update()
        self.on_files(self.reader.files)

    def await_orphans(self) -> None:
        """Wait until those have ended, too, whose bosses were killed."""
        deadline = time.monotonic() + PATIENCE
        self.look()
        while self.reader.unfinished() and time.monotonic() < deadline:
            time.sleep(GLANCE / 10)
            self.look()

    def stop_everyone(self) -> None:
        """Kill all jobs, bosses first, so that they do not try again what they see dying."""
        self.reader.update()
        while self.reader.unfinished():
            for badge, pid in self.reader.unfinished().items():
                self.journal.note(SHOT, badge)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            # One of them may have started another job just before.
            time.sleep(GLANCE / 2)
            self.reader.update()
