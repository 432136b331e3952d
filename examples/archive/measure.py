# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The work itself: read, hash, parse, tokenize and compress one file."""

from __future__ import annotations

import ast
import io
import lzma
import os
import stat
import time
import tokenize
import warnings
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from archive.report import WORTH_COMPRESSING, Problem, Report, Row

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What a file goes through, in this order.
STAGES = ("read", "hash", "ast", "tokenize", "lzma")

#: These names promise Python: only under them is it a problem if the text is something else.
SOURCES = (".py", ".pyi", ".pyw")

#: Some releases of Python tokenize in a time that grows with the square of a line's length.
LONGEST_LINE = 1 << 16

LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": lzma.PRESET_DEFAULT}

#: Which way to compress suits a file best shows only by trying: the default, one for text, and one
#: that knows what jumps in machine code look like.
CHAINS: tuple[list[dict[str, int]], ...] = (
    [LZMA2],
    [{**LZMA2, "lc": 0, "pb": 0}],
    [{"id": lzma.FILTER_X86}, LZMA2],
)

#: The least dictionary that lzma takes, and that of its default preset.
DICTIONARIES = (1 << 12, 1 << 23)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the time that the block takes to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def measure(path: Path, deadly: str = "") -> Report:
    """Report one file, whatever is in it.

    With `deadly`, looking into the file is what jobs have died of, and this says how: then the
    file is hashed and no more.
    """
    watch = Stopwatch()
    problem = None
    try:
        with watch("read"):
            kind, data = read(path)
    except (OSError, MemoryError) as error:
        kind, data = "unreadable", b""
        problem = Problem(path, kind, getattr(error, "strerror", None) or repr(error))
    with watch("hash"):
        digest = sha256(data).digest()
    report = Report(path, kind, digest, files=1, seconds=watch.seconds)
    if kind != "file":
        return replace(report, problems=(problem,)) if problem else report
    if deadly:
        problem = Problem(path, "deadly", deadly)
        return replace(report, size=len(data), problems=(problem,))
    return look_into(report, data, watch)


def read(path: Path) -> tuple[str, bytes]:
    """The kind of a file, and its contents or where the link points; nothing else is opened."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return "link", os.fsencode(os.readlink(path))  # noqa: PTH115 - needs no Path
    if not stat.S_ISREG(mode):
        return "special", b""
    # Another program may have put a FIFO or a link in its place by now: neither wait nor follow.
    with open(path, "rb", opener=cautiously) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return "special", b""
        return "file", stream.read()


def cautiously(path: str, flags: int) -> int:
    """Open what is really there, at once."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def look_into(report: Report, data: bytes, watch: Stopwatch) -> Report:
    """Complete the report of a regular file with what its contents say."""
    path = report.path
    source = path.name.endswith(SOURCES)
    tokens = functions = 0
    problems: list[Problem] = []
    if not is_text(data, source=source):
        problems.append(Problem(path, "binary", f"{len(data):,} bytes"))
    else:
        try:
            if source:
                with watch("ast"):
                    functions = count_functions(data, path.name)
            with watch("tokenize"):
                tokens = count_tokens(data)
        except Exception as error:
            # That text in another language is no Python is no problem.
            if source:
                wrong = isinstance(error, (SyntaxError, tokenize.TokenError))
                kind = "syntax" if wrong else "not parsed"
                problems.append(Problem(path, kind, f"{type(error).__name__}: {error}"))
    packed = len(data)
    try:
        with watch("lzma"):
            packed = compressed_size(data)
    except (lzma.LZMAError, MemoryError) as error:
        problems.append(Problem(path, "not compressed", repr(error)))
    lines = data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
    row = Row(path, len(data), packed, lines, functions, sum(watch.seconds.values()))
    return replace(
        report,
        size=len(data),
        packed=packed,
        tokens=tokens,
        lines=lines,
        functions=functions,
        largest=(row,),
        slowest=(row,),
        best=(row,) if len(data) >= WORTH_COMPRESSING else (),
        problems=tuple(problems),
    )


def is_text(data: bytes, *, source: bool) -> bool:
    """Whether Python's tokenizer may be asked about it; a source declares its own encoding."""
    if b"\0" in data:
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return source
    return True


def count_tokens(data: bytes) -> int:
    """How many tokens Python sees."""
    if max(map(len, data.splitlines()), default=0) > LONGEST_LINE:
        raise ValueError(f"a line is longer than {LONGEST_LINE:,} bytes")
    return sum(1 for _ in tokenize.tokenize(io.BytesIO(data).readline))


def count_functions(data: bytes, name: str) -> int:
    """How many functions and methods a source defines, at any depth."""
    with warnings.catch_warnings():
        # What the parser thinks of a source's escape sequences is for its author to read.
        warnings.simplefilter("ignore")
        tree = ast.parse(data, name)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sum(isinstance(node, kinds) for node in ast.walk(tree))


def compressed_size(data: bytes) -> int:
    """How many bytes lzma makes of it at best.

    A dictionary larger than the data only costs memory: no byte less comes out, but a process that
    uses lzma for the first time spends 10 ms on page faults, more than on most files.
    """
    least, most = DICTIONARIES
    fitting = 1 << max(len(data) - 1, 0).bit_length()
    size = {"dict_size": min(max(fitting, least), most)}
    chains = ([*before, {**lzma2, **size}] for *before, lzma2 in CHAINS)
    return min(len(lzma.compress(data, filters=chain)) for chain in chains)


# What is slow the first time is done here, once, in the process that jobs are forked from, and not
# again in each of them: Python makes ready what the stages need (regular expressions, classes). And
# glibc learns to keep blocks of such a size when they are freed; lzma takes and frees several for
# each file, and the kernel would clear them each time.
measure(Path(__file__))
bytes(1 << 24)
