# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What only the C interfaces offer: addresses, memory that nobody has cleared, another's memory; and
what the kernel is to do about memory.

Imported when the first large buffer comes by (``_large``), or when forks are dear (``_collapse``),
and only if ``ctypes`` can be.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

# Libraries of our own, not ctypes.pythonapi: what is declared of their functions is ours alone.
_python = ctypes.PyDLL(None)
_system = ctypes.CDLL(None)

_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
# The others that mincore sets are reserved.
_LOWEST_BIT = bytes(byte & 1 for byte in range(256))
_PYBUF_SIMPLE = 0
_PYBUF_WRITE = 0x200


class _View(ctypes.Structure):
    """Py_buffer."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("owner", ctypes.c_void_p),
        ("length", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _declare(library: Any, name: str, result: Any, *arguments: Any) -> Any:
    function = library[name]
    function.restype = result
    function.argtypes = arguments
    return function


_int, _size, _long = ctypes.c_int, ctypes.c_ssize_t, ctypes.c_ulong
_pointer, _object = ctypes.c_void_p, ctypes.py_object
_get_buffer = _declare(_python, "PyObject_GetBuffer", _int, _object, _pointer, _int)
_release_buffer = _declare(_python, "PyBuffer_Release", None, _pointer)
_view_of = _declare(_python, "PyMemoryView_FromMemory", _object, _pointer, _size, _int)
_new: dict[Any, Any] = {
    bytes: _declare(_python, "PyBytes_FromStringAndSize", _object, _pointer, _size),
    bytearray: _declare(_python, "PyByteArray_FromStringAndSize", _object, _pointer, _size),
}
_madvise = _declare(_system, "madvise", _int, _pointer, ctypes.c_size_t, _int)
_mincore = _declare(_system, "mincore", _int, _pointer, ctypes.c_size_t, _pointer)
_process_vm_readv = _declare(
    _system, "process_vm_readv", _size, _int, _pointer, _long, _pointer, _long, _long
)
_TwoParts = ctypes.c_size_t * 4  # an array of two struct iovec


def address_of(buffer: Any) -> int:
    """Return where the bytes of ``buffer`` are, for as long as it lives and keeps its size."""
    view = _View()
    _get_buffer(buffer, ctypes.byref(view), _PYBUF_SIMPLE)
    address = int(view.address or 0)
    _release_buffer(ctypes.byref(view))
    return address


def new(kind: type, length: int, *, huge: bool) -> tuple[Any, memoryview]:
    """
    Return a ``bytes`` or ``bytearray`` with no content yet, and the view to fill it by.

    Args:
        kind: Which of the two.
        length: How many bytes.
        huge: Have it in huge pages, where there are any.
    """
    made = _new[kind](None, length)
    address = address_of(made)
    if huge:
        start = address & -mmap.PAGESIZE
        _madvise(start, address + length - start, _MADV_HUGEPAGE)
    return made, _view_of(address, length, _PYBUF_WRITE)


def read_memory(
    pid: int, source: int, target: memoryview, token_source: int, token: bytearray
) -> bool:
    """Copy from another process, first to ``target``, then to ``token``; False if not all came."""
    size = target.nbytes
    ours = _TwoParts(address_of(target), size, address_of(token), len(token))
    theirs = _TwoParts(source, size, token_source, len(token))
    count = _process_vm_readv(pid, ctypes.byref(ours), 2, ctypes.byref(theirs), 2, 0)
    return bool(count == size + len(token))


def in_memory(address: int, length: int) -> bytes:
    """Return a byte for each page, 1 if it is in memory; none if they are not all mapped."""
    count = -(-length // mmap.PAGESIZE)
    found = ctypes.create_string_buffer(count)
    if _mincore(address, length, found):
        return b""
    return found.raw.translate(_LOWEST_BIT)


def collapse(address: int, length: int) -> bool:
    """Have memory in huge pages, from one boundary of these to another; False if not all is."""
    return not _madvise(address, length, _MADV_COLLAPSE)
