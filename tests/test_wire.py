# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Frames: what goes beside the pickle, what is lent, and every way in which that can go wrong."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
from typing import Any, Callable, Optional

import pytest
from helpers import PATIENCE, await_end
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs_large import Blob, content

from jobserver import _dump, _fds, _large, _reader, _wire
from jobserver._reader import FrameReader
from jobserver._wire import (
    ASIDE,
    RESULT,
    TASK,
    UNTIL_CLOSED,
    UNTIL_TAKEN,
    Corrupt,
    Frame,
    dump,
    encode,
    send,
)
from jobserver._worker._next import receive_job

SIZE = 3_000_001


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few megabytes take several rounds."""
    monkeypatch.setattr(_large, "_WORTH_LENDING", 1)
    monkeypatch.setattr(_large, "_WORTH_IMPORTING", 1)
    monkeypatch.setattr(_reader, "_FETCH_QUANTUM", 1 << 20)
    monkeypatch.setattr(_reader, "_READ_QUANTUM", 1 << 20)


class Sender:
    """A process that sends frames on a channel, and ends."""

    def __init__(self, channel: str, frames: list[Any], lend: int) -> None:
        if channel == "pipe":
            reader, writer = os.pipe()
        else:
            reader, writer = (sock.detach() for sock in socket.socketpair())
        self.fd = reader
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(reader)
                for value in frames:
                    send(writer, encode(RESULT, "text", dump(value), lend=lend))
            finally:
                os._exit(0)
        os.close(writer)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        # Not reaped: the process id stays its own.
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> None:
        os.close(self.fd)
        await_end(self.pid)
        os.waitpid(self.pid, 0)


WAYS = [("pipe", UNTIL_CLOSED), ("socket", UNTIL_CLOSED), ("socket", UNTIL_TAKEN), ("pipe", 0)]


def values() -> list[Any]:
    """Frames of all sorts."""
    data = content(SIZE)
    return [
        data,
        bytearray(data),
        Blob(bytearray(data)),
        [data[: SIZE // 2], {1: bytearray(data[SIZE // 2 :])}, Blob(data), "end"],
        "x" * SIZE,
        list(range(100_000)),
        [Blob(data[:20_000])] * 3,
    ]


def receive(reader: FrameReader, fd: int, at_round: Callable[[int], None]) -> Frame:
    """Receive a frame on a descriptor that does not block, as a reactor does."""
    rounds = 0
    while True:
        assert select.select([fd], [], [], PATIENCE)[0]
        at_round(rounds)
        rounds += 1
        frame = reader.feed(fd)
        if frame is not None:
            return frame


def nothing_special(_round: int) -> None:
    pass


@pytest.mark.contract("F6")
@pytest.mark.parametrize(("channel", "lend"), WAYS)
@pytest.mark.parametrize("number", range(7))
@pytest.mark.parametrize("blocking", [True, False])
def test_frames_arrive(channel: str, lend: int, number: int, blocking: bool) -> None:
    """A frame arrives whole, on every kind of channel, whether the receiver blocks or not."""
    value = values()[number]
    sender = Sender(channel, [value], lend)
    reader = FrameReader()
    if blocking:
        frame: Optional[Frame] = None
        while frame is None:
            frame = reader.feed(sender.fd)
    else:
        os.set_blocking(sender.fd, False)
        frame = receive(reader, sender.fd, nothing_special)

    assert (frame.text, frame.flags) == ("text", 0)
    assert frame.load() == value
    sender.end()


@pytest.mark.contract("F6")
@pytest.mark.parametrize("refused_at", [None, 0, 2])
def test_a_channel_goes_on(monkeypatch: pytest.MonkeyPatch, refused_at: Optional[int]) -> None:
    """On one channel frames follow each other, however they were received."""
    refuse(monkeypatch, refused_at)
    frames = values()
    sender = Sender("socket", frames, UNTIL_TAKEN)
    os.set_blocking(sender.fd, False)
    reader = FrameReader()

    for value in frames:
        assert receive(reader, sender.fd, nothing_special).load() == value
    sender.end()


def refuse(monkeypatch: pytest.MonkeyPatch, at: Optional[int]) -> None:
    """Let nothing be fetched from the given call on."""
    calls: list[int] = []
    fetch = _large.Loan.fetch

    def fetch_some(loan: _large.Loan, most: int) -> int:
        calls.append(most)
        return 0 if at is not None and len(calls) > at else fetch(loan, most)

    monkeypatch.setattr(_large.Loan, "fetch", fetch_some)


@pytest.mark.contract("F6")
@pytest.mark.parametrize(("channel", "lend"), WAYS[:3])
@pytest.mark.parametrize("refused_at", [0, 1, 2])
def test_what_cannot_be_fetched_comes_by_the_channel(
    monkeypatch: pytest.MonkeyPatch, channel: str, lend: int, refused_at: int
) -> None:
    """Where fetching fails, at whatever point, the channel brings all."""
    refuse(monkeypatch, refused_at)
    value = values()[3]
    sender = Sender(channel, [value], lend)
    os.set_blocking(sender.fd, False)

    assert receive(FrameReader(), sender.fd, nothing_special).load() == value
    sender.end()


@pytest.mark.contract("F9")
@pytest.mark.parametrize(("channel", "lend"), WAYS)
@pytest.mark.parametrize("refused_at", [None, 0])
@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_killed_sender_has_not_sent(
    monkeypatch: pytest.MonkeyPatch,
    channel: str,
    lend: int,
    refused_at: Optional[int],
    killed_at: int,
) -> None:
    """Nothing is received of a sender that is killed before the end, at whatever point."""
    refuse(monkeypatch, refused_at)
    value = Blob(bytearray(content(SIZE)))
    sender = Sender(channel, [value], lend)
    os.set_blocking(sender.fd, False)
    killed = []

    def kill(number: int) -> None:
        if number == killed_at:
            sender.kill()
            killed.append(number)

    try:
        frame = receive(FrameReader(), sender.fd, kill)
    except EOFError:
        assert killed
    else:
        # It had sent all by then: how much comes at once is the kernel's to decide.
        assert killed_at
        assert frame.load() == value
    sender.end()


@pytest.mark.contract("F9")
@pytest.mark.parametrize(("channel", "lend"), WAYS[:3])
def test_a_sender_about_to_be_killed_has_not_sent(channel: str, lend: int) -> None:
    """Nor of one that is still to notice that it has been killed."""
    sender = Sender(channel, [Blob(bytearray(content(SIZE)))], lend)
    os.set_blocking(sender.fd, False)

    def kill(number: int) -> None:
        if not number:
            os.kill(sender.pid, signal.SIGKILL)

    with pytest.raises(EOFError):
        receive(FrameReader(), sender.fd, kill)
    sender.end()


def lent(buffer: Any) -> tuple[_large.Lender, _large.Loan, bytearray]:
    lender = _large.lend([buffer])
    assert lender is not None
    target = bytearray(len(buffer))
    return lender, _large.Loan(lender.head(), [memoryview(target)]), target


@pytest.mark.contract("F6")
def test_fetching_in_parts() -> None:
    """What is lent can be fetched part by part, for as long as it is lent."""
    data = content(100_000)
    lender, loan, target = lent(data)

    assert loan.fetch(60_000) == 60_000
    assert not loan.complete
    assert loan.fetch(60_000) == 40_000
    assert loan.complete
    assert target == data

    lender, loan, target = lent(data)
    assert loan.fetch(60_000) == 60_000
    lender.end()
    assert loan.fetch(60_000) == 0


@pytest.mark.contract("F6")
def test_fetching_from_somebody_else() -> None:
    """Another process under the sender's number is found out, whatever it has in its memory."""
    lender, _loan, target = lent(content(100_000))
    me = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        lender.end()  # the same memory, but for the token
        os.write(writer, b"!")
        signal.pause()
    assert os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    head = lender.head()
    head = head.replace(struct.pack("<Q", me), struct.pack("<Q", pid), 1)

    assert _large.Loan(head, [memoryview(target)]).fetch(1 << 20) == 0
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert _large.Loan(head, [memoryview(target)]).fetch(1 << 20) == 0


@pytest.mark.contract("F6")
def test_fetching_from_no_memory() -> None:
    """An address at which there is nothing is no more than a refusal."""
    lender, _loan, target = lent(content(100_000))
    head = lender.head()[:-8] + struct.pack("<Q", 16)

    assert _large.Loan(head, [memoryview(target)]).fetch(1 << 20) == 0


@pytest.mark.contract("S2")
@pytest.mark.parametrize("refused_at", [None, 0, 2])
def test_jobs_with_lent_arguments(
    monkeypatch: pytest.MonkeyPatch, refused_at: Optional[int]
) -> None:
    """Arguments arrive beside the channel, whose descriptor is closed then."""
    refuse(monkeypatch, refused_at)
    frames = values()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    before = set(os.listdir("/proc/self/fd"))
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for value in frames:
                frame, fds = receive_job(theirs, b"", [])
                assert frame.load() == value
                assert fds == []
            ours.close()
            assert set(os.listdir("/proc/self/fd")) < before
            status = 0
        finally:
            os._exit(status)
    for value in frames:
        _fds.send_job(ours, [], encode(TASK, "text", dump(value), lend=ASIDE))

    assert os.waitpid(pid, 0)[1] == 0
    assert set(os.listdir("/proc/self/fd")) == before
    ours.close()
    theirs.close()


@pytest.mark.contract("F9")
@pytest.mark.parametrize(
    ("flags", "entry"),
    [(_wire.LENT_FLAG | _wire.ASIDE_FLAG, 5 | 128 << 56), (0, 5 | 77 << 56), (128, 0 | 128 << 56)],
)
def test_garbage(flags: int, entry: int) -> None:
    """What no sender sends is refused in words, whatever it looks like."""
    head = _wire.HEADER.pack(_wire.MAGIC, RESULT, flags, 0, 3)
    head += struct.pack("<3Q", 0, 0, entry)
    reader = FrameReader()

    with pytest.raises(Corrupt):
        reader.push(head + bytes(5 + _wire.LENDER_SIZE + 8))


@pytest.mark.parametrize("value", [None, 7, "text", b"x" * 5000])
@pytest.mark.parametrize("text", ["", "text"])
def test_frames_in_two_parts(value: Any, text: str) -> None:
    """A small frame is the same in one piece, and wherever it is torn."""
    (data,) = encode(RESULT, text, dump(value), flags=_wire.STAYS, exitcode=3)
    for place in (*range(0, min(len(data), 80), 7), len(data) - 1, len(data)):
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        frames = FrameReader()
        found = []
        for part in (data[:place], data[place:]):
            os.write(writer, part)
            found.append(frames.feed(reader))
        os.close(reader)
        os.close(writer)
        frame = found[0] or found[1]
        assert frame is not None
        assert (frame.load(), frame.text) == (value, text)
        assert (frame.kind, frame.flags, frame.exitcode) == (RESULT, _wire.STAYS, 3)
        assert frames.progress == len(data)


@pytest.mark.parametrize("place", [0, 4, 16])
def test_brief_garbage(place: int) -> None:
    """A frame of two segments with a wrong byte in its head is refused, or awaits its rest."""
    (data,) = encode(RESULT, "", dump(7))
    wrong = bytearray(data)
    wrong[place] ^= 0x55
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, wrong)
    frames = FrameReader()
    if place < 16:
        with pytest.raises(Corrupt):
            frames.feed(reader)
    else:
        assert frames.feed(reader) is None
    os.close(reader)
    os.close(writer)


@pytest.mark.contract("F9")
def test_more_than_there_is_memory() -> None:
    """A frame that no memory could hold is refused in words."""
    for kind in range(3):
        head = _wire.HEADER.pack(_wire.MAGIC, RESULT, 0, 0, 3)
        head += struct.pack("<3Q", 0, 0, 1 << 55 | kind << 56)
        with pytest.raises(Corrupt, match="no memory"):
            FrameReader().push(head)


# What goes beside the pickle


@pytest.mark.contract("F6")
def test_large_objects_are_not_copied() -> None:
    """Large bytes and bytearrays go beside the pickle, as they are, wherever they are."""
    first, second = bytes(SIZE), bytearray(SIZE)
    pickled, *buffers = dump({"a": [first, "x", (second,)], "b": first})

    assert len(pickled) < 200
    assert [buffer is expected for buffer, expected in zip(buffers, (first, second))] == [True] * 2
    assert _dump.load(pickled, buffers) == {"a": [first, "x", (second,)], "b": first}


@pytest.mark.contract("F6")
def test_small_objects_stay_inside() -> None:
    """What is not large stays in the pickle."""
    assert len(dump([bytes(200_000), bytearray(200_000)])) == 1


def large(kind: type) -> st.SearchStrategy[Any]:
    return st.integers((1 << 16) - 3, (1 << 16) + 3).map(lambda size: kind(content(size)))


ANNOUNCING = [
    b"B" + struct.pack("<I", 1 << 16),
    b"\x96" + struct.pack("<Q", 1 << 16),
    b"\x95" + struct.pack("<Q", 1 << 16),
]


@pytest.mark.contract("F6")
@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.one_of(
            large(bytes),
            large(bytearray),
            st.just("u" * (1 << 16)),
            st.binary(max_size=12),
            st.sampled_from(ANNOUNCING),
            st.integers(),
        ),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
        max_leaves=12,
    )
)
def test_anything_is_the_same_afterwards(value: Any) -> None:
    """Whatever is large, and whatever stands before it, comes out as it went in."""
    before = _dump.LARGE
    _dump.LARGE = 1 << 16
    try:
        pickled, *buffers = dump(value)
    finally:
        _dump.LARGE = before

    assert _dump.load(pickled, list(buffers)) == value


@pytest.mark.contract("F6")
def test_what_looks_like_an_announcement() -> None:
    """Inside of a frame, bytes that look like an opcode and a length are bytes."""
    announcement = b"B" + struct.pack("<I", SIZE)
    frame = b"some data" + announcement
    framed = b"\x95" + struct.pack("<Q", len(frame)) + frame

    assert not _dump._announces(framed, announcement)
    assert not _dump._announces(b"\x80\x05" + framed, announcement)
    assert _dump._announces(b"\x80\x05" + framed + b"\x94" + announcement, announcement)
    assert _dump._announces(b"\x94" + announcement, announcement)
    assert not _dump._announces(b"four" + announcement, announcement)


@pytest.mark.contract("F6")
def test_views_that_are_no_blocks() -> None:
    """What is not contiguous goes into the pickle."""
    data = bytearray(content(100_000))
    every_other = memoryview(data)[::2]
    with pytest.raises(BufferError):
        pickle.PickleBuffer(every_other).raw()

    with pytest.raises(pickle.PicklingError):
        dump(Blob(every_other))


@pytest.mark.contract("P2")
def test_nothing_is_imported_for_small_frames() -> None:
    """A program whose jobs are small pays nothing for large ones."""
    code = (
        "import sys\n"
        "from jobserver import Jobserver\n"
        "Jobserver('fork', 1).submit(len, args=(b'x' * 1000,)).result()\n"
        "print('jobserver._large' in sys.modules, 'mmap' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )

    assert done.stdout.split() == ["False", "False"]
