# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Watch how much memory a process and its descendants have together, until stdin ends.

    python sampler.py PID

Prints what they have at the beginning, and at the end the most that they had meanwhile, in bytes.
A page that several of them share counts once: this is the sum of proportional set sizes.
"""

from __future__ import annotations

import os
import select
import sys


def parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for name in os.listdir("/proc"):  # noqa: PTH208  # pathlib takes longer to import than this may
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                    # The command, in parentheses, may contain anything.
                    found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
    return found


def descendants(root: int, parent_of: dict[int, int]) -> list[int]:
    """All processes below one."""
    children: dict[int, list[int]] = {}
    for pid, parent in parent_of.items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    heads = [root]
    while heads:
        below = children.get(heads.pop(), [])
        found += below
        heads += below
    return found


def memory_of(pid: int, key: str) -> int:
    """Bytes of all fields whose name begins so, such as Rss, Pss or Private; 0 once it is gone."""
    # Pss is also the beginning of the names of its parts.
    begin = f"{key}_" if key == "Private" else f"{key}:"
    total = 0
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:  # noqa: PTH123
            for line in file:
                if line.startswith(begin):
                    total += int(line.split()[1]) * 1024
    except OSError:
        return 0
    return total


def together(root: int) -> int:
    """What a process and its descendants have, this one not counted."""
    pids = [root, *descendants(root, parents())]
    return sum(memory_of(pid, "Pss") for pid in pids if pid != os.getpid())


def main(root: int) -> None:
    """Watch."""
    most = together(root)
    print(most, flush=True)
    while not select.select([0], [], [], 0.001)[0]:
        most = max(most, together(root))
    print(most)


if __name__ == "__main__":
    main(int(sys.argv[1]))
