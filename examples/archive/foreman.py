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
from archive.journal import AGAIN, RUNNING, SHOT, Badge, Reader, peak
from jobserver import Jobserver

if TYPE_CHECKING:
    from pathlib import Path

    from archive.report import Report

#: Seconds between two looks at the journal, each of which may end in a shot.
GLANCE = 0.05


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
    with Jobserver(context, slots, lend=True) as jobserver:
        reader = Reader()
        foreman = Foreman(Crew(jobserver, reader.path), reader, on_files)
        try:
            report = foreman.report(root, kill_some)
            seconds = time.perf_counter() - start
        finally:
            # Those are left whose bosses were killed; or all, after Ctrl-C.
            foreman.stop_everyone()
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


class Foreman(Boss):
    """The boss of the first job, who sees what all jobs note in the journal."""

    def __init__(self, crew: Crew, reader: Reader, on_files: Callable[[int], None]) -> None:
        super().__init__(crew, badge=None)
        self.reader = reader
        self.on_files = on_files
        self.kill_some = False

    def report(self, root: Path, kill_some: bool) -> Report:
        """Have the whole tree reported."""
        self.kill_some = kill_some
        return self.collect(self.submit(Task(root, is_folder=True)))

    def submit(self, task: Task, attempt: int = 1) -> Submission:
        """Start the first job, with SIGINT blocked.

        All other processes inherit that from it. So Ctrl-C, which a terminal sends to each of
        them, interrupts nobody but the main program, and that looks after the others.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return super().submit(task, attempt)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def outcome(self, submission: Submission) -> Report:
        """What the first job returns or raises; meanwhile it watches the others."""
        while not submission.future.wait(GLANCE):
            self.look()
            if self.kill_some:
                self.shoot_somebody()
        self.look()
        return submission.future.result()

    def look(self) -> None:
        """Read the journal, and show how far they are."""
        self.reader.update()
        self.on_files(self.reader.files)

    def shoot_somebody(self) -> None:
        """Send SIGKILL to any job, running or waiting, that is not a second attempt."""
        second = self.reader.badges(AGAIN)
        victims = [item for item in self.reader.unfinished().items() if item[0] not in second]
        if victims:
            self.shoot(*victims[int.from_bytes(os.urandom(4), "big") % len(victims)])

    def shoot(self, badge: Badge, pid: int) -> None:
        """Send SIGKILL to the process that runs a job, and to no other."""
        process = -1
        with suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
        # A job notes its end before it ends. If it has not done so by now, then the descriptor
        # is not that of another process with the same number.
        self.reader.update()
        if badge in self.reader.unfinished():
            self.journal.note(SHOT, badge)
            if process >= 0:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
        if process >= 0:
            os.close(process)

    def stop_everyone(self) -> None:
        """Kill all jobs, bosses first, so that they do not try again what they see dying."""
        self.reader.update()
        while self.reader.unfinished():
            for badge, pid in self.reader.unfinished().items():
                self.shoot(badge, pid)
            # One of them may have started another job just before.
            time.sleep(GLANCE)
            self.reader.update()
