# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What the kernel and the interpreter need by themselves: nobody who uses them can be faster."""

from __future__ import annotations

import os
import select
from typing import Any

from workload import System


class Fork(System):
    """A forked process that ends at once, and that is waited for."""

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def once(self) -> None:
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)

    def burst(self, count: int) -> None:
        running: list[int] = []
        for _ in range(count):
            if len(running) == self.slots:
                os.waitpid(running.pop(0), 0)
            pid = os.fork()
            if not pid:
                os._exit(0)
            running.append(pid)
        for pid in running:
            os.waitpid(pid, 0)


class Pipes(System):
    """Workers that answer one byte with one byte, under one epoll, without a thread."""

    def __init__(self, slots: int) -> None:
        self.epoll = select.epoll()
        self.to: dict[int, int] = {}
        self.pids: list[int] = []
        for _ in range(slots):
            self.start()

    def start(self) -> None:
        job, ours = os.pipe()
        answer, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            # Ends of earlier workers' pipes go, or those would never see the end of theirs.
            for fd in (ours, answer, *self.to, *self.to.values()):
                os.close(fd)
            while os.read(job, 1):
                os.write(theirs, b".")
            os._exit(0)
        os.close(job)
        os.close(theirs)
        self.pids.append(pid)
        self.to[answer] = ours
        self.epoll.register(answer, select.EPOLLIN)

    def once(self) -> None:
        answer, to = next(iter(self.to.items()))
        os.write(to, b".")
        self.epoll.poll()
        os.read(answer, 1)

    def burst(self, count: int) -> None:
        for to in list(self.to.values())[:count]:
            os.write(to, b".")
        rest = count - len(self.to)
        answered = 0
        while answered < count:
            for answer, _event in self.epoll.poll():
                os.read(answer, 1)
                answered += 1
                if rest > 0:
                    rest -= 1
                    os.write(self.to[answer], b".")

    def close(self) -> None:
        for fd in (*self.to, *self.to.values()):
            os.close(fd)
        for pid in self.pids:
            os.waitpid(pid, 0)


class Copy(System):
    """One copy into memory of its own, without any other process."""

    def __init__(self, slots: int) -> None:
        pass

    def submit(self, fn: Any, *args: Any) -> Any:
        return fn(*map(copied, args))

    def result(self, handle: Any) -> Any:
        return tuple(map(copied, handle)) if isinstance(handle, tuple) else handle


def copied(value: Any) -> Any:
    return value.copy() if hasattr(value, "copy") else value


VARIANTS: dict[str, Any] = {"fork": Fork, "pipes": Pipes, "copy": Copy}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
