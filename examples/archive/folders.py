# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The report of a folder: the same code, whether its children are jobs or plain calls."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, NamedTuple, Protocol

from archive.measure import Stopwatch, measure
from archive.report import Problem, Report, combine

#: Left out wherever they are: what others installed, and what changes while we look at it.
EXCLUDED = {"site-packages", "__pycache__"}


class Task(NamedTuple):
    """A file or a folder to report."""

    path: Path
    is_folder: bool


class Team(Protocol):
    """Whoever makes the reports of a folder's children."""

    def run(self, tasks: list[Task]) -> list[Report]:
        """The reports in the order of the tasks."""


class Alone:
    """The serial run: one call after the other, in this process."""

    def __init__(self, on_file: Callable[[], None]) -> None:
        self.on_file = on_file

    def run(self, tasks: list[Task]) -> list[Report]:
        """Make the reports, telling on_file of each file that is done."""
        return [self.perform(task) for task in tasks]

    def perform(self, task: Task) -> Report:
        """Make one report."""
        report = perform(task, self)
        if not task.is_folder:
            self.on_file()
        return report


def perform(task: Task, team: Team) -> Report:
    """Make the report of a file, or of a folder with the help of a team."""
    return report_folder(task.path, team) if task.is_folder else measure(task.path)


def report_folder(path: Path, team: Team) -> Report:
    """Report a folder; its own share of the work is the stage "folders"."""
    watch = Stopwatch()
    with watch("folders"):
        kind, tasks, problems = scan(path)
    children = team.run(tasks)
    with watch("folders"):
        report = combine(path, children, kind, problems)
    report.seconds["folders"] = report.seconds.get("folders", 0.0) + watch.seconds["folders"]
    return report


def scan(path: Path) -> tuple[str, list[Task], list[Problem]]:
    """List a folder, the sub-folders first: they take longest, so they had better start early."""
    try:
        with os.scandir(path) as entries:
            tasks = [
                Task(Path(entry.path), entry.is_dir(follow_symlinks=False)) for entry in entries
            ]
    except OSError as error:
        problem = Problem(path, "unreadable", error.strerror or repr(error))
        return "unreadable", [], [problem]
    tasks = [task for task in tasks if not (task.is_folder and task.path.name in EXCLUDED)]
    tasks.sort(key=lambda task: (not task.is_folder, os.fsencode(task.path.name)))
    return "folder", tasks, []


def count_files(path: Path) -> int:
    """How many files a run over this tree will report, for the progress line."""
    total = 0
    for folder, folders, files in os.walk(path):
        # A link to a folder is listed among the folders, but is reported as a file.
        links = [name for name in folders if Path(folder, name).is_symlink()]
        folders[:] = [name for name in folders if name not in EXCLUDED]
        total += len(files) + len(links)
    return total
