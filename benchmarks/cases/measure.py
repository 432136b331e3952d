# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Measure one system in one way, and print what was found as one line of JSON.

    python case_NAME.py VARIANT MEASURE '{"parameter": value, ...}'

The parameters are those of the function that has the measure's name. The line is either a mapping
of metrics to numbers, or `{"unavailable": reason}` where the system cannot do what is asked for,
or `{"failed": reason}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Callable

import memory
import workload
from workload import System, Unavailable

Make = Callable[[int], System]
Metrics = dict[str, float]

#: No crowd is larger than this, however fast the system is.
CROWD = 4_000_000
#: How many calls give a median that can be relied on.
CALLS = (5, 2_000)


def crowd(
    make: Make,
    *,
    slots: int = 2,
    seconds: float = 1.0,
    once: bool = True,
    megabytes: int = 0,
    modules: int = 0,
) -> Metrics:
    """Jobs that do nothing: how many a second, and how long one takes from call to result.

    With `megabytes` and `modules`, from a process of that size.
    """
    held = memory.ballast(megabytes), memory.import_modules(modules)
    with closing(make(slots)) as system:
        found = rates(system, seconds, once)
    del held
    return found


def rates(system: System, seconds: float, once: bool) -> Metrics:
    """Measure what `crowd` is about, once all workers have started."""
    system.burst(8)
    found = {"jobs_per_s": throughput(system, seconds)}
    if once:
        found["round_trip_us"] = round_trip(system, seconds) * 1e6
    return found


def throughput(system: System, seconds: float) -> float:
    """Jobs a second, in a crowd that takes about so many seconds; smaller ones tell its size."""
    count = 2
    while (took := timed(partial(system.burst, count))) < seconds / 4 and count < CROWD:
        count = min(CROWD, count * 4)
    count = max(2, min(CROWD, round(count * seconds / took)))
    return count / timed(partial(system.burst, count))


def round_trip(system: System, seconds: float) -> float:
    """The median time from the call to the result of one job alone."""
    system.once()
    return repeated(lambda: timed(system.once), seconds / 2)


def nested(make: Make, *, slots: int = 2, seconds: float = 1.0) -> Metrics:
    """The same as `crowd`, launched from a job; where the slots are one budget, of that budget."""
    with tempfile.TemporaryDirectory() as directory, closing(make(slots + 1)) as outer:
        report = Path(directory, "report")
        inner = outer if outer.travels else make
        outer.result(outer.submit(nested_job, inner, slots, seconds, str(report)))
        found: Metrics = json.loads(report.read_text())
    return found


def nested_job(inner: Any, slots: int, seconds: float, report: str) -> None:
    """Measure inside a job, and leave the report in a file: not every system returns results."""
    if isinstance(inner, System):
        found = rates(inner, seconds, once=True)
    else:
        with closing(inner(slots)) as system:
            found = rates(system, seconds, once=True)
    Path(report).write_text(json.dumps(found))


def uneven(make: Make, *, slots: int = 2, items: int = 600) -> Metrics:
    """A map over jobs of which one in fifty sleeps a hundred times as long as the others."""
    durations = [0.1 if index % 50 == 0 else 0.001 for index in range(items)]
    random.Random(items).shuffle(durations)
    with closing(make(slots)) as system:
        exhaust(system.map(workload.nothing_with, range(slots)))
        took = timed(lambda: exhaust(system.map(workload.sleep, durations)))
    return {"jobs_per_s": items / took}


def sleepers(make: Make, *, slots: int = 2, seconds: float = 0.05, each: int = 4) -> Metrics:
    """Jobs that sleep, so that all slots can be busy whatever the CPUs: how many a second."""
    count = slots * each
    with closing(make(slots)) as system:
        crowd_of_sleepers(system, slots, seconds)
        took = timed(lambda: crowd_of_sleepers(system, count, seconds))
    return {"jobs_per_s": count / took, "of_ideal": count * seconds / slots / took}


def crowd_of_sleepers(system: System, count: int, seconds: float) -> None:
    for handle in [system.submit(workload.sleep, seconds) for _ in range(count)]:
        system.result(handle)


def transfer(make: Make, *, kind: str, size: int, direction: str, seconds: float = 0.5) -> Metrics:
    """How long data is on its way: from `submit` into fn, or from fn's return into the caller."""
    with prepared(make, kind) as system:
        way = way_of(system, kind, size, direction)
        way()
        found = repeated(way, seconds, calls=(3, 50))
    return {"ms": found * 1e3}


def footprint(make: Make, *, kind: str, size: int, direction: str) -> Metrics:
    """The most memory that the caller and its workers have together while data is on its way."""
    with prepared(make, kind) as system, memory.Peak() as peak:
        way = way_of(system, kind, size, direction)
        for _ in range(4):
            way()
    return {"peak_of_data": peak.grown / size}


def way_of(system: System, kind: str, size: int, direction: str) -> Callable[[], float]:
    """Return a function that sends data once, and returns the seconds that took."""
    if direction == "result":

        def back() -> float:
            departed, data = system.result(system.submit(workload.departure, kind, size))
            took = time.monotonic() - departed
            del data
            return float(took)

        return back

    data = workload.make_data(kind, size)

    def there() -> float:
        departed = time.monotonic()
        arrived: float = system.result(system.submit(workload.arrival, data))
        return arrived - departed

    return there


@contextlib.contextmanager
def prepared(make: Make, kind: str) -> Iterator[System]:
    """A system whose workers need not import NumPy first, however they are started."""
    if kind == "numpy":
        import multiprocessing

        workload.make_data(kind, 8)
        multiprocessing.set_forkserver_preload(["numpy"])
    with closing(make(1)) as system:
        system.once()
        yield system


def many_done(make: Make, *, count: int, slots: int = 2) -> Metrics:
    """So many jobs that do nothing, of which every Future is kept: what one job costs."""
    with closing(make(slots)) as system:
        system.burst(slots)
        begin = time.perf_counter()
        handles = [system.submit(workload.nothing) for _ in range(count)]
        for handle in handles:
            system.result(handle)
        took = time.perf_counter() - begin
    return {"us_per_job": took / count * 1e6}


def many_in_flight(make: Make, *, count: int, slots: int = 0) -> Metrics:
    """So many jobs at once, none of which ends before all are submitted: what one job costs.

    Without `slots` there is one for each.
    """
    memory.raise_descriptor_limit()
    room = memory.Room(count)
    with tempfile.TemporaryDirectory() as directory:
        gate = str(Path(directory, "gate"))
        os.mkfifo(gate)
        opened = -1
        try:
            with closing(make(slots or count)) as system:
                handles: list[Any] = []
                try:
                    begin = time.perf_counter()
                    for _ in range(count):
                        handles.append(system.submit(workload.pass_gate, gate))
                        room.check(len(handles))
                    submitted = time.perf_counter()
                finally:
                    # For reading, too, so that this does not wait for anybody.
                    opened = os.open(gate, os.O_RDWR)
                    for handle in handles:
                        system.result(handle)
                collected = time.perf_counter()
        except OSError as error:
            raise Unavailable(f"{count} at once: {error}") from error
        finally:
            if opened >= 0:
                os.close(opened)
    return {
        "us_per_submit": (submitted - begin) / count * 1e6,
        "us_per_result": (collected - submitted) / count * 1e6,
    }


def idle_memory(make: Make, *, slots: int = 2, server: bool = False) -> Metrics:
    """What idle workers, and the process that they are forked from if there is one, occupy."""
    with closing(make(slots)) as system:
        for _ in range(5):
            system.burst(slots * 2)
        # Fresh workers are given the time to go.
        time.sleep(0.3)
        return memory.of_workers(server=server)


def trips(make: Make, *, count: int, together: bool = False, slots: int = 1) -> Metrics:
    """So many jobs that do nothing, one after the other or all at once: what the submitter spent.

    Two runs with different counts tell what one job costs, without what starting and ending cost.
    """
    with closing(make(slots)) as system:
        system.burst(4 * slots)
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        if together:
            system.burst(count)
        else:
            for _ in range(count):
                system.once()
        took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "pid": os.getpid(),
        "wall_us": took * 1e6,
        "user_us": (after.ru_utime - before.ru_utime) * 1e6,
        "system_us": (after.ru_stime - before.ru_stime) * 1e6,
        "faults": after.ru_minflt - before.ru_minflt,
    }


@contextlib.contextmanager
def closing(system: System) -> Iterator[System]:
    """End all workers afterwards."""
    try:
        yield system
    finally:
        system.close()


def timed(action: Callable[[], object]) -> float:
    """Return how many seconds the action took."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def repeated(action: Callable[[], float], seconds: float, calls: tuple[int, int] = CALLS) -> float:
    """Return the median of what an action that is repeated for so long returns."""
    least, most = calls
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < least or (len(found) < most and time.perf_counter() < end):
        found.append(action())
    return statistics.median(found)


def exhaust(items: Any) -> None:
    """Take all there is."""
    for _ in items:
        pass


MEASURES: dict[str, Callable[..., Metrics]] = {
    measure.__name__: measure
    for measure in (
        crowd,
        nested,
        uneven,
        sleepers,
        transfer,
        footprint,
        many_done,
        many_in_flight,
        idle_memory,
        trips,
    )
}


def main(variants: Mapping[str, Any]) -> None:
    """Run what the command line says, of a case that has these variants."""
    variant, measure, parameters = sys.argv[1:]
    report(partial(MEASURES[measure], variants[variant], **json.loads(parameters)))


def report(action: Callable[[], Metrics]) -> None:
    """Print what the action returns, or why it does not."""
    found: Mapping[str, object]
    try:
        found = action()
    except (Unavailable, ModuleNotFoundError) as error:
        found = {"unavailable": str(error)}
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
