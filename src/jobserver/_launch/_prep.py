# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What a process that is not forked from this one must be told about it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import process, util
from typing import Any, Optional

from jobserver._errors import Unguarded

_GUARD = """\
work was submitted while a worker was importing the main module.

With the start methods spawn and forkserver each worker imports the main module, so whatever
starts work there must be guarded:

    if __name__ == "__main__":
        main()
"""


def refuse_while_importing() -> None:
    """Raise RuntimeError if this process is a worker that is still importing the main module."""
    if getattr(process.current_process(), "_inheriting", False):
        raise Unguarded(_GUARD)


def surroundings() -> dict[str, Any]:
    """Return what may change during the life of this process."""
    original: Any = process.ORIGINAL_DIR  # type: ignore[attr-defined, unused-ignore]
    try:
        here = os.getcwd()
    except OSError:  # the directory is gone
        here = original
    return {
        "sys_path": [original if entry == "" and original else entry for entry in sys.path],
        "sys_argv": list(sys.argv),
        "dir": here,
        "environ": dict(os.environ),
        "authkey": bytes(process.current_process().authkey),
    }


_process: Any = process
# The surroundings, and what tells cheaply whether they are still the same.
_seen: tuple[Any, dict[str, Any]] = ((), {})


def watched() -> dict[str, Any]:
    """Return ``surroundings()``: the very same object for as long as nothing has changed."""
    global _seen  # noqa: PLW0603
    environ: Any = os.environ
    try:
        here: Optional[str] = os.getcwd()
    except OSError:
        here = None
    data = getattr(environ, "_data", environ)  # the latter if the program has replaced it
    authkey = _process._current_process._config["authkey"]
    signs: tuple[Any, ...] = (data, sys.path, sys.argv, here, authkey)
    known, now = _seen
    if signs != known:
        # Copies: the originals may be changed in place.
        known = tuple(sign.copy() if hasattr(sign, "copy") else sign for sign in signs)
        now = surroundings()
        # Both at once, for other threads.
        _seen = known, now
    return now


def foundations() -> dict[str, Any]:
    """Return what does not: the main module, the start method, logging."""
    original: Any = process.ORIGINAL_DIR  # type: ignore[attr-defined, unused-ignore]
    found: dict[str, Any] = {"orig_dir": original, **_main_module(original)}
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        found["start_method"] = method
    log: Any = util
    found["log_to_stderr"] = log._log_to_stderr
    if log._logger is not None:
        found["log_level"] = log._logger.getEffectiveLevel()
    return found


def _main_module(original: Any) -> dict[str, str]:
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    if name is not None:
        return {"init_main_from_name": name}
    path = getattr(main, "__file__", None)
    if path is None:
        return {}  # -c, stdin, a notebook
    if not os.path.isabs(path) and original is not None:
        path = os.path.join(original, path)
    # A name such as <stdin> is no file that a worker could import.
    return {"init_main_from_path": os.path.normpath(path)} if os.path.exists(path) else {}


def changes(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return what differs."""
    return {key: value for key, value in now.items() if before.get(key) != value}
