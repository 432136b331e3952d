# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
What an outer GNU make tells in MAKEFLAGS, and the descriptor of its pool.

MAKEFLAGS is split as make does it: a backslash quotes, ``--`` ends the options (variables follow,
whatever they look like), and of several jobserver options the last one counts, in either spelling.
The descriptors named need not be make's any more (a recipe without ``+`` does not get them), so
they are believed only if they are one FIFO; and they are reopened, since O_NONBLOCK belongs to the
open file description that is shared with make.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import NamedTuple, Optional

from ._section import F_SETPIPE_SZ, OPEN_FLAGS, PAGE, ring_of

_OPTIONS = ("--jobserver-auth=", "--jobserver-fds=")
# As much as an unprivileged process may ask for: each token that is spliced back takes a page.
_OUTER_PAGES = 256


class Unusable(Exception):
    """MAKEFLAGS names a pool that cannot be joined: why, and what to do."""


class Outer(NamedTuple):
    """An outer pool: a descriptor of our own, and the N of ``-jN`` where it is told."""

    fd: int
    slots: Optional[int]


def open_outer(makeflags: str) -> Optional[Outer]:
    """
    Open the pool that ``makeflags`` offers.

    Returns:
        None when there is none, or when it is not for us: a dry run, a disabled pool.

    Raises:
        Unusable: There is one, and it cannot be used.
    """
    words = split_flags(makeflags)
    if words and "n" in words[0] and not words[0].startswith("-") and "=" not in words[0]:
        return None  # make -n: nothing is to be done
    auth = None
    slots = None
    for word in words:
        if word == "--":
            break
        for option in _OPTIONS:
            if word.startswith(option):
                auth = word[len(option) :]
        if word.startswith("-j") and word[2:].isdigit():
            slots = int(word[2:])
    if auth is None:
        return None
    fd = _open_fifo(auth[5:]) if auth.startswith("fifo:") else _open_pair(auth)
    return None if fd is None else Outer(fd, slots)


def split_flags(makeflags: str) -> list[str]:
    """Split into words as make does; the first is empty if there are no single-letter options."""
    words: list[str] = [""]
    quoted = False
    dollar = False
    for char in makeflags:
        if quoted:
            words[-1] += char
            quoted = False
        elif char == "\\":
            quoted = True
        elif char in " \t\n":
            words.append("")
        elif char == "$" and dollar:
            dollar = False
            continue
        else:
            words[-1] += char
        dollar = char == "$"
    return words[:1] + [word for word in words[1:] if word]


def _open_fifo(path: str) -> int:
    try:
        # For reading and writing, so that the opening waits for nobody.
        fd = os.open(path, OPEN_FLAGS)
    except OSError as error:
        raise Unusable(
            f"the FIFO {path!r} cannot be opened ({error.strerror});"
            " has the make that made it ended?"
        ) from None
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise Unusable(f"{path!r} is no FIFO")
    return _enlarge(fd)


def _open_pair(auth: str) -> Optional[int]:
    try:
        reader, writer = (int(word) for word in auth.split(","))
    except ValueError:
        raise Unusable(f"the option --jobserver-auth={auth} cannot be understood") from None
    if reader < 0 or writer < 0:
        return None  # disabled for this process
    hint = 'add "+" before the recipe line that starts this program'
    try:
        found, other = os.fstat(reader), os.fstat(writer)
    except OSError:
        raise Unusable(f"its descriptors {auth} are not open here; {hint}") from None
    same = (found.st_dev, found.st_ino) == (other.st_dev, other.st_ino)
    if not (stat.S_ISFIFO(found.st_mode) and same):
        raise Unusable(f"the descriptors {auth} are other files here; {hint}")
    try:
        return _enlarge(os.open(f"/proc/self/fd/{reader}", OPEN_FLAGS))
    except OSError as error:
        raise Unusable(f"its descriptors {auth} cannot be reopened ({error.strerror})") from None


def _enlarge(fd: int) -> int:
    try:
        if ring_of(fd) < _OUTER_PAGES:
            fcntl.fcntl(fd, F_SETPIPE_SZ, _OUTER_PAGES * PAGE)
    except OSError:
        pass  # over the quota: what is returned to a full ring is written instead
    return fd
