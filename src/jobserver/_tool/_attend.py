# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Run one command in place of this process: its signals, its exit status."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping, Sequence

from . import UserError

_FORWARDED = (
    *(signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)
# What Python ignores, and a command must not find ignored.
_DEFAULT = (signal.SIGPIPE, signal.SIGXFSZ)


def attend(command: Sequence[str], env: Mapping[str, str], fds: Sequence[int] = ()) -> int:
    """
    Run a command and wait for it; signals that are sent to this process are sent on to it.

    Args:
        command: A name that is looked for on PATH, and arguments.
        env: Its environment.
        fds: Descriptors for it, under the same numbers.

    Returns:
        Its exit status; 128 plus the number of the signal that ended it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    waited_for = {signal.SIGCHLD, *_FORWARDED}
    # Blocked, so that none can come between the start and the waiting.
    outside = signal.pthread_sigmask(signal.SIG_BLOCK, waited_for)
    try:
        pid = _start(command, env, fds, outside)
        return _wait(pid, waited_for)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, outside)


def _start(
    command: Sequence[str],
    env: Mapping[str, str],
    fds: Sequence[int],
    mask: Iterable[int],
) -> int:
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        return os.posix_spawnp(
            command[0], list(command), dict(env), setsigmask=mask, setsigdef=_DEFAULT
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: no such command", 127) from None
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}", 126) from None
    finally:
        for fd in fds:
            os.set_inheritable(fd, False)


def _wait(pid: int, waited_for: set[signal.Signals]) -> int:
    while True:
        found = signal.sigwaitinfo(waited_for)
        if found.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif found.si_code <= 0:
            os.kill(pid, found.si_signo)
        # Else it is from the terminal, which has sent it to the command as well.
