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
from collections.abc import Mapping
from typing import NamedTuple, Optional

from jobserver._forking import lifted
from jobserver.makeflags import (
    BadAuth,
    CannotOpenFifo,
    DescriptorsClosed,
    DescriptorsOfOthers,
    DryRun,
    NoJobserver,
    NoMakeflags,
    NoPoolOffered,
    NotAFifo,
    PoolDisabled,
)

from ._section import F_SETPIPE_SZ, OPEN_FLAGS, PAGE, ring_of

AUTH_OPTIONS = ("--jobserver-auth=", "--jobserver-fds=")
# As much as an unprivileged process may ask for: each token that is spliced back takes a page.
_OUTER_PAGES = 256


class Outer(NamedTuple):
    """An outer pool: a descriptor of our own, and the N of ``-jN`` where it is told."""

    fd: int
    slots: Optional[int]


def outer_from(environ: Mapping[str, str]) -> Outer:
    """
    Open the pool that the environment offers.

    Raises:
        MakeflagsError: There is none, or it cannot be used.
    """
    try:
        return open_outer(environ.get("MAKEFLAGS", ""))
    except (NoMakeflags, NoJobserver) as none:
        # Cargo tells its build scripts in a variable of its own.
        try:
            return open_outer(environ.get("CARGO_MAKEFLAGS", ""))
        except NoPoolOffered:
            raise none from None


def open_outer(makeflags: str) -> Outer:
    """
    Open the pool that ``makeflags`` offers.

    Raises:
        MakeflagsError: There is none, or it cannot be used.
    """
    if not makeflags.strip():
        raise NoMakeflags("MAKEFLAGS is not set: this process was not started by make")
    words = split_flags(makeflags)
    if "n" in words[0]:
        raise DryRun("make runs with -n: nothing is to be done")
    auth, slots = read_options(words)
    if auth is None:
        raise NoJobserver("make shares no jobs here: it was started without -jN, or with -j1")
    return Outer(_open_fifo(auth[5:]) if auth.startswith("fifo:") else _open_pair(auth), slots)


def read_options(words: list[str]) -> tuple[Optional[str], Optional[int]]:
    """Return what the last jobserver option says, and the N of ``-jN``; None where not told."""
    auth = None
    slots = None
    for word in words:
        if word == "--":
            break
        for option in AUTH_OPTIONS:
            if word.startswith(option):
                auth = word[len(option) :]
        if word.startswith("-j") and is_count(word[2:]):
            slots = int(word[2:])
    return auth, slots


def split_flags(makeflags: str) -> list[str]:
    """Split into words as make does; the first is empty if there are no single-letter options."""
    return [unquote(word) for word in quoted_words(makeflags)]


def quoted_words(makeflags: str) -> list[str]:
    """Do as ``split_flags``, with the words as they are written there."""
    words = [""]
    quoted = False
    for char in makeflags.lstrip(" \t\n"):
        if char in " \t\n" and not quoted:
            words.append("")
        else:
            words[-1] += char
        quoted = char == "\\" and not quoted
    if quoted:
        words[-1] += "\\"  # nothing follows that it could quote, but something may be put there
    first = unquote(words[0])
    if first.startswith("-") or "=" in first:
        words.insert(0, "")
    return words[:1] + [word for word in words[1:] if word]


def unquote(word: str) -> str:
    """Return what make reads where this is written."""
    text = ""
    quoted = False
    dollar = False
    for char in word:
        if quoted:
            text += char
            quoted = False
        elif char == "\\":
            quoted = True
        elif char == "$" and dollar:
            dollar = False
            continue
        else:
            text += char
        dollar = char == "$"
    return text


def _open_fifo(path: str) -> int:
    try:
        if not stat.S_ISFIFO(os.stat(path).st_mode):  # opening a device may do things
            raise NotAFifo(f"{path!r} is no FIFO")
        # For reading and writing, so that the opening waits for nobody.
        fd = lifted(os.open(path, OPEN_FLAGS))
    except OSError as error:
        raise CannotOpenFifo(
            f"the FIFO {path!r} cannot be opened ({error.strerror});"
            " has the make that made it ended?"
        ) from None
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotAFifo(f"{path!r} is no FIFO")
    return _enlarge(fd)


def _open_pair(auth: str) -> int:
    hint = 'add "+" before the recipe line that starts this program'
    words = auth.split(",")
    if len(words) != 2 or not all(_is_number(word) for word in words):
        raise BadAuth(f"the option --jobserver-auth={auth} cannot be understood")
    reader, writer = (int(word) for word in words)
    if reader < 0 or writer < 0:
        raise PoolDisabled(f"make has disabled it for this recipe; {hint}")
    try:
        found, other = os.fstat(reader), os.fstat(writer)
    except (OSError, OverflowError):
        raise DescriptorsClosed(f"its descriptors {auth} are not open here; {hint}") from None
    same = (found.st_dev, found.st_ino) == (other.st_dev, other.st_ino)
    if not (stat.S_ISFIFO(found.st_mode) and same):
        raise DescriptorsOfOthers(f"the descriptors {auth} are other files here; {hint}")
    try:
        return _enlarge(lifted(os.open(f"/proc/self/fd/{reader}", OPEN_FLAGS)))
    except OSError as error:
        raise DescriptorsClosed(
            f"its descriptors {auth} cannot be reopened ({error.strerror})"
        ) from None


def is_count(word: str) -> bool:
    """Say whether it is digits that ``int`` knows: ``str.isdigit`` holds for superscripts, too."""
    return word.isascii() and word.isdigit()


def _is_number(word: str) -> bool:
    digits = word.removeprefix("-")
    return is_count(digits) and len(digits) < 12


def _enlarge(fd: int) -> int:
    try:
        if ring_of(fd) < _OUTER_PAGES:
            fcntl.fcntl(fd, F_SETPIPE_SZ, _OUTER_PAGES * PAGE)
    except OSError:
        pass  # over the quota: what is returned to a full ring is written instead
    return fd
