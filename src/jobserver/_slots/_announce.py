# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""
Write MAKEFLAGS for a command, so that it and all it starts take their slots from a pool of ours.

No single form is understood by everybody. Make 4.2 and 4.3 abort on ``fifo:PATH``; ninja knows
nothing else; gcc 12 looks at descriptors only; make 4.1 and older wants ``--jobserver-fds`` and no
number after ``-j``. But make stops reading at ``--``, and takes what follows for variables, which
it hands on; all others take the last word that looks like the option, wherever it is. So one string
(``universal``) can offer the descriptors to make and the path to the others.

The path leads through /proc to a descriptor of this process: nothing is in the file system, and
nobody but this user can open it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Optional

from jobserver._forking import lifted

from ._makeflags import AUTH_OPTIONS, is_count, quoted_words, unquote

STYLES = ("auto", "universal", "fifo", "pipe")
# Make strips blanks at the beginning of a variable's value, so there is an x.
_CARRIER = "JOBSERVER_FIFO="
_JOBS = ("-j", "--jobs")


def check_style(style: str) -> str:
    """Return ``style`` if it is one, with ``auto`` resolved."""
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, not {style!r}")
    # Whom the command will start is not known, so it must be what all of them understand.
    return "universal" if style == "auto" else style


class ChildEnv(dict[str, str]):
    """
    The environment of a command that is to share slots, and the descriptors that go with it.

    A dict to be given to ``subprocess`` as ``env``, with ``pass_fds`` as its ``pass_fds``. The
    descriptors are open until ``close``, the end of a with-block, or the end of this object.
    """

    #: The descriptors that MAKEFLAGS names; to be passed on under the same numbers.
    pass_fds: tuple[int, ...]

    def __init__(
        self,
        pipe: int,
        slots: int,
        style: str,
        changes: Mapping[str, Optional[str]],
        base: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.pass_fds = ()
        super().__init__(os.environ if base is None else base)
        # Where one of these is set it speaks of another pool, or of this one by other numbers.
        for name in ("CARGO_MAKEFLAGS", "MFLAGS"):
            self.pop(name, None)
        if style != "fifo":
            # Descriptions that are nobody else's: make sets O_NONBLOCK as it likes, and others
            # fail if they meet it. Opening waits for nobody, as this process has both ends open.
            reader = lifted(os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_CLOEXEC))
            self.pass_fds = (reader,)
            writer = lifted(os.open(f"/proc/self/fd/{pipe}", os.O_WRONLY | os.O_CLOEXEC))
            self.pass_fds = (reader, writer)
        pair = ",".join(map(str, self.pass_fds))
        self["MAKEFLAGS"] = compose(self.get("MAKEFLAGS", ""), style, pair, path_of(pipe), slots)
        for name, value in changes.items():
            if value is None:
                self.pop(name, None)
            else:
                self[name] = value

    def close(self) -> None:
        """Close the descriptors. A command that has been started has its own."""
        fds, self.pass_fds = self.pass_fds, ()
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> ChildEnv:  # noqa: PYI034  # Self came with Python 3.11
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __copy__(self) -> dict[str, str]:
        return dict(self)

    def __deepcopy__(self, memo: object) -> dict[str, str]:
        return dict(self)

    def __reduce__(self) -> tuple[type[dict[str, str]], tuple[dict[str, str]]]:
        return dict, (dict(self),)


def compose(makeflags: str, style: str, pair: str, path: str, slots: int) -> str:
    """
    Return MAKEFLAGS that offer a pool, with all else that they say already.

    Args:
        makeflags: What there is: ``-k``, ``-s``, variables, perhaps another pool.
        style: ``universal``, ``fifo``, ``pipe``, or ``none`` for no pool but ``-jN``.
        pair: The descriptors for reading and writing, ``R,W``.
        path: The path of the FIFO, without blanks.
        slots: The N of ``-jN``.
    """
    letters, options, variables = _dissect(makeflags)
    if style == "fifo":
        pool = [f"-j{slots}", f"--jobserver-auth=fifo:{path}"]
    elif style == "none":
        pool = [f"-j{slots}"]
    elif style == "pipe":
        pool = [f"-j{slots}", f"--jobserver-auth={pair}"]
    else:
        pool = ["-j", f"--jobserver-fds={pair}", f"--jobserver-auth={pair}"]
        variables.append(f"{_CARRIER}x\\ --jobserver-auth=fifo:{path}")
    first = unquote(options[0]) if options else ""
    if first.startswith("-") or "=" in first:
        options += pool
    else:
        options = pool + options  # else a target would come first, and be taken for letters
    return " ".join([letters, *options, *(["--", *variables] if variables else [])])


def path_of(pipe: int) -> str:
    """Return a path under which others can open the FIFO behind a descriptor."""
    path = os.readlink(f"/proc/self/fd/{pipe}")
    try:
        found, wanted = os.stat(path), os.fstat(pipe)
        same = (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino)
    except OSError:
        same = False  # anonymous, or removed
    # A name outlives this process. But only make would understand a quoted blank.
    plain = path.startswith("/") and not set(path) & set(" \t\n\\$")
    return path if same and plain else f"/proc/{os.getpid()}/fd/{pipe}"


def _dissect(makeflags: str) -> tuple[str, list[str], list[str]]:
    """Return single letters, options but those about jobs, and variables, as they are quoted."""
    letters, *words = quoted_words(makeflags)
    # Make removes the quotes first, and then looks for options, and for their end.
    meant = [unquote(word) for word in words]
    end = meant.index("--") if "--" in meant else len(words)
    options = []
    for number in range(end):
        # Also the number of ``-j 3``, which would be a target.
        counts = number > 0 and meant[number - 1] in _JOBS and is_count(meant[number])
        if not counts and not meant[number].startswith((*_JOBS, *AUTH_OPTIONS)):
            options.append(words[number])
    variables = [
        word
        for word, text in zip(words[end + 1 :], meant[end + 1 :])
        if not text.startswith(_CARRIER)
    ]
    return letters, options, variables
