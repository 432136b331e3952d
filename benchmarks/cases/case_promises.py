# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
The least forked job that keeps the first of the promises, written down in one piece.

Its slot survives any SIGKILL, its death is noticed at once, a signal handler cannot raise amid the
books, and it finds a name, a parent and an empty stdin. There are no callbacks, threads, nested
jobs, timeouts, tracebacks, large answers or anything else: who wants those cannot be faster.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import fcntl
import gc
import os
import pickle
import select
import signal
import struct
import sys
import threading
from multiprocessing import process
from typing import Any

from workload import System

HEAD = struct.Struct("<4sBBxxiIQQ")
FLAGS = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD)
BERTHS = 8


class Promise:
    """A job in flight."""

    __slots__ = ("answer", "channel", "lease")

    answer: Any
    channel: int
    lease: int


def fifo() -> int:
    """Open both ends of an anonymous FIFO."""
    reader, writer = os.pipe()
    try:
        return os.open(f"/proc/self/fd/{reader}", FLAGS)
    finally:
        os.close(reader)
        os.close(writer)


class Promises(System):
    """Slots, and the jobs on them."""

    def __init__(self, slots: int) -> None:
        self.pipe = fifo()
        os.write(self.pipe, b"+" * slots)
        self.berths = [f"/proc/self/fd/{fifo()}" for _ in range(BERTHS)]
        self.turn = 0
        self.epoll = select.epoll()
        self.watched: dict[int, Promise] = {}
        self.lock = threading.RLock()
        module: Any = process
        self.process: Any = module
        self.me = module.BaseProcess(name="worker")
        self.parent = module._ParentProcess("MainProcess", os.getpid(), -1)  # noqa: SLF001

    def submit(self, fn: Any, *args: Any) -> Promise:
        before = _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        _signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
        try:
            with self.lock:
                while True:
                    # A berth that is still locked belongs to a worker that is about to end.
                    self.turn = (self.turn + 1) % BERTHS
                    lease = os.open(self.berths[self.turn], FLAGS)
                    try:
                        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.splice(self.pipe, lease, 1)
                        break
                    except BlockingIOError:
                        os.close(lease)
                        self.hear()
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                reader, writer = os.pipe()
                pid = os.fork()
                if not pid:
                    self.work(reader, writer, before, fn, args)
                os.close(writer)
                pidfd = os.pidfd_open(pid)
                self.epoll.register(reader, select.EPOLLIN)
                self.epoll.register(pidfd, select.EPOLLIN)
                job = Promise()
                job.answer, job.channel, job.lease = None, reader, lease
                self.watched[reader] = self.watched[pidfd] = job
                return job
        finally:
            _signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def work(self, reader: int, writer: int, before: Any, fn: Any, args: Any) -> None:
        """Be a worker."""
        code = 1
        try:
            for fd in (reader, *self.watched):
                os.close(fd)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
            gc.freeze()
            self.process._current_process = self.me  # noqa: SLF001
            self.process._parent_process = self.parent  # noqa: SLF001
            _signal.pthread_sigmask(signal.SIG_SETMASK, before)
            data = pickle.dumps(fn(*args), 5)
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(writer, HEAD.pack(b"JsF2", 1, 0, 0, 2, 0, len(data)) + data)
            code = 0
        finally:
            os._exit(code)

    def hear(self) -> None:
        """Wait for answers and deaths, and return the slots."""
        for fd, _event in self.epoll.poll():
            job = self.watched.pop(fd)
            self.epoll.unregister(fd)
            if fd != job.channel:
                os.waitid(os.P_PIDFD, fd, os.WEXITED)
                os.close(fd)
                continue
            data = os.read(fd, 1 << 16)
            os.close(fd)
            HEAD.unpack_from(data)
            os.splice(job.lease, self.pipe, 1)
            fcntl.flock(job.lease, fcntl.LOCK_UN)
            os.close(job.lease)
            job.answer = data[HEAD.size :]

    def result(self, handle: Promise) -> Any:
        before = _signal.pthread_sigmask(signal.SIG_BLOCK, ())
        _signal.pthread_sigmask(signal.SIG_BLOCK, DEFERRED)
        try:
            with self.lock:
                while handle.answer is None:
                    self.hear()
        finally:
            _signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pickle.loads(handle.answer)


VARIANTS: dict[str, Any] = {"promises": Promises}

if __name__ == "__main__":
    from measure import main

    main(VARIANTS)
