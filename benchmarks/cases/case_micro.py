# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Single operations: of this package, and of what it is compared with."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Callable

import micro


def operation(name: str, *, seconds: float = 1.0) -> dict[str, float]:
    """How long one operation takes; by pyperf where it is installed, else by a plain loop."""
    if importlib.util.find_spec("pyperf") is None:
        return {"us": by_loop(micro.OPERATIONS[name], seconds) * 1e6}
    return {"us": by_pyperf(name, brief=seconds < 0.1) * 1e6}


def by_pyperf(name: str, *, brief: bool) -> float:
    """Return the median of what pyperf finds in a few processes."""
    options = ["--debug-single-value"] if brief else ["--processes=3", "--values=3", "--warmups=1"]
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.json")
        subprocess.run(
            [
                *(sys.executable, micro.__file__, name, "--quiet", "-o", str(report), *options),
                # pyperf hands down little else of the environment.
                f"--inherit-environ={','.join(key for key in os.environ if key[:6] == 'PYTHON')}",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        runs = json.loads(report.read_text())["benchmarks"][0]["runs"]
    values: list[float] = [value for run in runs for value in run.get("values", ())]
    return statistics.median(values)


def by_loop(function: Callable[[int], float], seconds: float) -> float:
    """Return the median of a few loops that are long enough."""
    loops = 1
    while function(loops) < seconds / 5:
        loops *= 2
    return statistics.median(function(loops) / loops for _ in range(3))


if __name__ == "__main__":
    from measure import report

    variant, _, parameters = sys.argv[1:]
    report(lambda: operation(variant, **json.loads(parameters)))
