# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Run an executor's initializer before a call."""

from __future__ import annotations

import logging
from typing import Any, Callable, NamedTuple

_LOGGER = logging.getLogger("concurrent.futures")


class InitializerFailed(Exception):
    """The initializer has raised; its exception is the cause."""


class Initializer(NamedTuple):
    """Calls ``initializer(*initargs)``, then what it is called with."""

    initializer: Callable[..., Any]
    initargs: tuple[Any, ...]

    def __call__(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Initialize, then call."""
        try:
            self.initializer(*self.initargs)
        except BaseException as error:
            _LOGGER.critical("Exception in initializer:", exc_info=True)
            raise InitializerFailed(repr(error)) from error
        return fn(*args, **kwargs)
