# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What the kernel and the interpreter need by themselves: nobody who uses them can be faster."""

from __future__ import annotations

import array
import os
import pickle
import select
import socket
from contextlib import suppress
from typing import Any

from workload import System, nothing

JOB: Any = nothing


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


class Job(System):
    """A forked process that makes a call and writes the pickled result into a pipe; no more."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.epoll = select.epoll()
        self.running: dict[int, int] = {}

    def start(self) -> None:
        answer, theirs = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(theirs, pickle.dumps(JOB()))
            finally:
                os._exit(0)
        os.close(theirs)
        self.note(answer, pid)

    def note(self, answer: int, pid: int) -> None:
        self.running[answer] = pid
        self.epoll.register(answer, select.EPOLLIN)

    def finish(self) -> int:
        """Take what is there; returns how many results that is."""
        found = self.epoll.poll()
        for answer, _event in found:
            pickle.loads(os.read(answer, 4096))
            self.epoll.unregister(answer)
            os.close(answer)
            self.reap(self.running.pop(answer))
        return len(found)

    def reap(self, pid: int) -> None:
        os.waitpid(pid, 0)

    def once(self) -> None:
        self.start()
        self.finish()

    def burst(self, count: int) -> None:
        started = ended = 0
        while ended < count:
            while started < count and len(self.running) < self.slots:
                self.start()
                started += 1
            ended += self.finish()


class Zygote(Job):
    """The same, forked on request by another process, which gets the call pickled."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if not self.pid:
            self.sock.close()
            try:
                self.serve(theirs)
            finally:
                os._exit(1)
        theirs.close()

    def serve(self, sock: socket.socket) -> None:
        """Fork until nobody can ask any more."""
        while True:
            data, ancillary, _flags, _address = sock.recvmsg(4096, socket.CMSG_SPACE(4))
            if not data:
                os._exit(0)
            (theirs,) = array.array("i", ancillary[0][2])
            if not os.fork():
                try:
                    os.write(theirs, pickle.dumps(pickle.loads(data)()))
                finally:
                    os._exit(0)
            os.close(theirs)
            with suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass

    def start(self) -> None:
        answer, theirs = os.pipe()
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs]))
        self.sock.sendmsg([pickle.dumps(JOB)], [rights])
        os.close(theirs)
        self.note(answer, 0)

    def reap(self, pid: int) -> None:
        """Leave that to the zygote."""

    def close(self) -> None:
        self.sock.close()
        os.waitpid(self.pid, 0)


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


VARIANTS: dict[str, Any] = {
    "fork": Fork,
    "job": Job,
    "zygote": Zygote,
    "pipes": Pipes,
    "copy": Copy,
}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
