# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Files and folders as nested jobs that share the slots of one Jobserver.

Every job gets the Crew as an argument, and a folder's job submits its children with it. Nothing
else is needed: how deep the tree is and how many slots there are is the Jobserver's business.
"""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from archive.folders import Task, perform
from archive.journal import (
    AGAIN,
    DEAD,
    FILE_ENDED,
    FOLDER_ENDED,
    RUNNING,
    WAITING,
    Badge,
    Journal,
)
from archive.measure import measure
from jobserver import SubmissionDied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from archive.report import Report
    from jobserver import Future, Jobserver

#: A job that has died this often is not tried again.
ATTEMPTS = 3


@dataclass(frozen=True)
class Crew:
    """What all jobs of one run have in common."""

    jobserver: Jobserver
    journal: Path


class DeadlyFolderError(Exception):
    """All jobs for a folder have died."""


class Submission(NamedTuple):
    """A job that somebody waits for."""

    task: Task
    attempt: int
    badge: Badge
    future: Future[Report]


class Boss:
    """A process that submits jobs and has those that die done again."""

    def __init__(self, crew: Crew, badge: Badge | None) -> None:
        self.crew = crew
        #: Its own badge; the main program has none.
        self.badge = badge
        self.journal = Journal(crew.journal)
        self.numbers = itertools.count()

    def run(self, tasks: list[Task]) -> list[Report]:
        """Have all tasks done as jobs; their reports in the same order."""
        submissions = [self.submit(task) for task in tasks]
        return [self.collect(submission) for submission in submissions]

    def submit(self, task: Task, attempt: int = 1) -> Submission:
        """Start a job as soon as there is a slot for it."""
        self.stop_if_orphaned()
        badge = Badge(os.getpid(), next(self.numbers))
        if attempt > 1:
            self.journal.note(AGAIN, badge)
        with self.waiting():
            future = self.crew.jobserver.submit(run_job, args=(task, self.crew, badge))
        return Submission(task, attempt, badge, future)

    def collect(self, submission: Submission) -> Report:
        """Wait for a report; when the job dies, have it done again."""
        try:
            with self.waiting():
                return self.outcome(submission)
        except SubmissionDied as death:
            self.journal.note(DEAD, submission.badge)
            if submission.attempt == ATTEMPTS:
                return give_up(submission.task, death)
        return self.collect(self.submit(submission.task, submission.attempt + 1))

    def outcome(self, submission: Submission) -> Report:
        """What a job returns or raises."""
        return submission.future.result()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note that the slot may be lent meanwhile."""
        if self.badge is None:
            yield
            return
        self.journal.note(WAITING, self.badge)
        try:
            yield
        finally:
            self.journal.note(RUNNING, self.badge)

    def stop_if_orphaned(self) -> None:
        """End this process when the one that submitted it was killed.

        Its slot is its own until it ends, so no harm is done by working on; but nobody is left to
        take the result, and the whole folder is being done again.
        """
        if self.badge is None:
            return
        try:
            os.kill(self.badge.boss, 0)
        except ProcessLookupError:
            sys.exit()


def give_up(task: Task, death: SubmissionDied) -> Report:
    """What can be said of a task whose jobs all die: the hash of a file, nothing of a folder."""
    if task.is_folder:
        # Not SubmissionDied: to whoever waits for this job, that would mean this job.
        raise DeadlyFolderError(f"{task.path}: {death}")
    return measure(task.path, deadly=str(death))


@contextmanager
def duty(crew: Crew, task: Task, badge: Badge) -> Iterator[Boss]:
    """One job's time at work, from its first to its last mark in the journal."""
    boss = Boss(crew, badge)
    try:
        boss.journal.note(RUNNING, badge)
        boss.stop_if_orphaned()
        yield boss
    finally:
        boss.journal.note(FOLDER_ENDED if task.is_folder else FILE_ENDED, badge)
        boss.journal.close()


def run_job(task: Task, crew: Crew, badge: Badge) -> Report:
    """What a worker process runs."""
    with duty(crew, task, badge) as boss:
        return perform(task, boss)
