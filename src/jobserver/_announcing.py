# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""MAKEFLAGS in the environment of a job: written in its worker, whose descriptors they name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Callable, Optional

from ._slots._announce import ChildEnv
from ._worker._task import manager_of

if TYPE_CHECKING:
    from types import TracebackType

    from ._shared import Shared

_NAMES = ("MAKEFLAGS", "MFLAGS", "CARGO_MAKEFLAGS")


class Announcing:
    """
    A job's ``preexec_fn`` that sets MAKEFLAGS, and then calls another one.

    Args:
        shared: Whose slots to offer; travels like a Jobserver that is an argument.
        style: How to offer them, see ``Jobserver.child_env``.
        then: The ``preexec_fn`` that the job has besides.
    """

    def __init__(self, shared: Shared, style: str, then: Optional[Callable[[], Any]]) -> None:
        self._shared = shared
        self._style = style
        self._then = then

    def __call__(self) -> _Announced:
        slots = self._shared.slots
        env = ChildEnv(slots.shared_pipe(), slots.slots, self._style, {})
        for fd in env.pass_fds:
            # For commands that are started without subprocess, or with close_fds=False.
            os.set_inheritable(fd, True)
        for name in _NAMES:
            os.environ.pop(name, None)
        os.environ["MAKEFLAGS"] = env["MAKEFLAGS"]
        manager = None if self._then is None else manager_of(self._then)
        return _Announced(env, manager)


class _Announced:
    """The descriptors are open while the job runs; a worker that stays restores its environment."""

    def __init__(self, env: ChildEnv, manager: Any) -> None:
        self._env = env
        self._manager = manager

    def __enter__(self) -> Any:
        return None if self._manager is None else self._manager.__enter__()

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> Any:
        try:
            return None if self._manager is None else self._manager.__exit__(kind, error, traceback)
        finally:
            self._env.close()
