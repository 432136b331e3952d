# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Large values, and jobs that take and give them."""

from __future__ import annotations

import importlib
import pickle
import random
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20


class Blob:
    """Offers its buffer to the pickler, as NumPy and Arrow do."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = memoryview(buffer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Blob, (pickle.PickleBuffer(self.buffer),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and self.buffer == other.buffer

    __hash__ = None  # type: ignore[assignment]


class Heavy(Exception):
    """An exception with much to say."""


def content(size: int) -> bytes:
    """Bytes of which none can be missed, doubled or moved without being noticed."""
    piece = random.Random(size).randbytes(65537)
    return (piece * (size // len(piece) + 1))[:size]


def make(kind: str, size: int) -> Any:
    """A value of so many bytes."""
    data = content(size)
    if kind == "bytes":
        return data
    if kind == "bytearray":
        return bytearray(data)
    if kind == "buffer":
        return Blob(bytearray(data))
    if kind == "nested":
        third = size // 3
        return {"a": [data[:third], (bytearray(data[third : 2 * third]),)], 5: Blob(data[-third:])}
    if kind == "arrow":
        pa: Any = importlib.import_module("pyarrow")
        numbers = pa.array(range(size // 16))
        return pa.table({"first": numbers, "second": numbers})
    np: Any = importlib.import_module("numpy")
    array = np.frombuffer(bytearray(data), np.uint8)
    if kind == "fortran":
        return np.asfortranarray(array[: size // 64 * 64].reshape(-1, 64))
    if kind == "every other":
        return array[::2]
    if kind == "data frame":
        pd: Any = importlib.import_module("pandas")
        return pd.DataFrame({"a": array, "b": array})
    return array


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, and of the same type."""
    if type(one) is not type(other):
        return False
    if hasattr(one, "equals"):
        return bool(one.equals(other))
    equal: Any = one == other
    return bool(equal.all() if hasattr(equal, "all") else equal)


def raise_heavy(kind: str, size: int) -> None:
    """Fail, with a value."""
    raise Heavy("too heavy", make(kind, size))


def overwrite(value: Any) -> Any:
    """Change the first byte of a buffer, and return the buffer."""
    memoryview(getattr(value, "buffer", value))[:1] = b"!"
    return value


def twice(value: Any) -> tuple[Any, Any]:
    """Give back the same object in two places."""
    return value, value


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
