# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Run an executor's initializer before a worker's first call."""

from __future__ import annotations

from typing import Any, Callable

from jobserver._errors import shown

from . import _stay


class InitializerFailed(Exception):
    """The initializer has raised; the text names what."""


class Initializer:
    """Calls ``initializer(*initargs)``."""

    def __init__(self, initializer: Callable[..., Any], initargs: tuple[Any, ...]) -> None:
        self.initializer = initializer
        self.initargs = initargs

    def __call__(self) -> None:
        """Initialize this worker: what that does to the environment stays done."""
        try:
            self.initializer(*self.initargs)
        except BaseException as error:
            import logging

            logger = logging.getLogger("concurrent.futures")
            logger.critical("Exception in initializer:", exc_info=True)
            raise InitializerFailed(shown(error)) from error
        _stay.accept()
