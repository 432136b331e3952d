# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Run rows in turn: one run of each, then again of each, so that noise hits all alike."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import envs
from .envs import Environment
from .results import Record
from .rows import Group, Row, brief, distinct
from .systems import System

CASES = Path(__file__).resolve().parents[1] / "cases"


def run_group(
    group: Group,
    environments: Mapping[str, Environment],
    session: str,
    *,
    rounds: int,
    quick: bool,
) -> dict[str, Record]:
    """Run all rows of a group, so many times in turn."""
    rows = distinct(group.rows) if quick else group.rows
    records = {row.id: Record(session) for row in rows}
    for number in range(rounds):
        # Every round begins with another row, so that none always follows the same one.
        start = number * len(rows) // rounds
        for row in rows[start:] + rows[:start]:
            record = records[row.id]
            if record.unavailable or number >= row.rounds:
                continue
            begin = time.monotonic()
            found = run(row, environments[row.system.environment], group.limit, quick=quick)
            note(record, found)
            took = time.monotonic() - begin
            progress = f"{number + 1}/{rounds} {row.id:<45} {took:5.1f} s  {shown(found)}"
            print(progress, file=sys.stderr, flush=True)
    return records


def note(record: Record, found: dict[str, Any]) -> None:
    """Add to a record what one run found."""
    if "unavailable" in found:
        record.unavailable = found["unavailable"]
    elif "failed" in found:
        record.failures.append(found["failed"])
        record.rounds.append(None)
    else:
        record.rounds.append(found)


def run(row: Row, environment: Environment, limit: float, *, quick: bool) -> dict[str, Any]:
    """Run a row once, in a process of its own; what that printed."""
    if environment.trouble:
        return {"unavailable": environment.trouble}
    parameters = brief(row) if quick else dict(row.parameters)
    env = envs.clean(os.environ)
    if environment.path:
        env["PYTHONPATH"] = environment.path
    with subprocess.Popen(
        command_of(row.system, environment, row.measure, parameters),
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"it did not end within {limit:.0f} s"}
        finally:
            # Nothing of a case may go on beside the next one.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return understood(output, errors, process.returncode)


def command_of(
    system: System, environment: Environment, measure: str, parameters: Mapping[str, Any]
) -> list[str]:
    """Return the command that measures a system."""
    script = str(CASES / system.case)
    return [environment.python, script, system.variant, measure, json.dumps(parameters)]


def understood(output: str, errors: str, status: int) -> dict[str, Any]:
    """Return what the last line of a case's output says."""
    lines = output.splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (errors.splitlines() or ["it printed nothing"])[-1]
        return {"failed": f"exit status {status}: {last}"}
    if "failed" in found:
        print(errors, file=sys.stderr, flush=True)
    elif status:
        return {"failed": f"exit status {status} after it had measured"}
    return found


def shown(found: Mapping[str, Any]) -> str:
    """Return what was found in a few words."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else format(value, ',.4g')}"
        for key, value in found.items()
    )
