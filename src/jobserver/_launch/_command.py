# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Start a fresh interpreter on one of our own modules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing import spawn, util
from typing import Any

from jobserver._forking import streams_held
from jobserver._signals import outside

_PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Until its job is there, Ctrl-C ends a worker at once: a KeyboardInterrupt could be lost, as what
# importing leaves to weak references prints exceptions and goes on.
UNTIL_JOB = """\
import os, signal
def end(number, frame):
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
"""


def start_interpreter(module: str, fds: Sequence[int], prelude: str = "") -> int:
    """
    Call ``main(*fds)`` of ``module`` in a new process that inherits ``fds``; returns its pid.

    Args:
        module: One of our own.
        fds: Descriptors, which keep their numbers.
        prelude: What to run first, while signals are still blocked.
    """
    helper: Any = util
    # The new process learns our sys.path only later, and must find this package before.
    mask = sorted(int(number) for number in outside())
    code = (
        f"{prelude}import signal; signal.pthread_sigmask(signal.SIG_SETMASK, {mask});"
        f" import sys; sys.path.insert(0, {_PACKAGE_ROOT!r});"
        f" from {module} import main; main({', '.join(map(str, fds))})"
    )
    command = [spawn.get_executable(), *helper._args_from_interpreter_flags(), "-c", code]
    with streams_held():
        pid: int = helper.spawnv_passfds(
            os.fsencode(spawn.get_executable()),
            [os.fsencode(word) for word in command],
            sorted(fds),
        )
    return pid
