# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What users hand in is checked here, before anything is taken or started."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, Callable, Optional, Union

Env = Union[Mapping[str, Optional[str]], Iterable[tuple[str, Optional[str]]]]


def deadline_of(timeout: Optional[float]) -> Optional[float]:
    """Return the ``time.monotonic`` instant at which ``timeout`` seconds from now are over."""
    if timeout is None:
        return None
    return time.monotonic() + check_timeout(timeout)


def check_timeout(timeout: float) -> float:
    """Return ``timeout`` as finite seconds >= 0."""
    if not (hasattr(timeout, "__float__") or hasattr(timeout, "__index__")):
        raise TypeError(
            f"timeout must be None or a number of seconds, not {type(timeout).__name__}"
        )
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"timeout must be None or finite seconds >= 0, not {timeout!r}")
    return seconds


def check_slots(slots: int) -> int:
    """Return ``slots`` if it is an int >= 1."""
    if isinstance(slots, bool) or not isinstance(slots, int):
        raise TypeError(f"slots must be an int or None, not {type(slots).__name__}")
    if slots < 1:
        raise ValueError(f"slots must be >= 1, not {slots}")
    return slots


def check_tasks(tasks: Optional[int]) -> Optional[int]:
    """Return ``tasks`` if it is None or an int >= 1."""
    if isinstance(tasks, bool) or not isinstance(tasks, (int, type(None))):
        raise TypeError(f"max_tasks_per_child must be an int or None, not {type(tasks).__name__}")
    if tasks is not None and tasks < 1:
        raise ValueError(f"max_tasks_per_child must be None or >= 1, not {tasks}")
    return tasks


def check_consume(consume: int) -> int:
    """Return ``consume`` if it is the int 0 or 1."""
    if type(consume) is not int or consume not in (0, 1):
        raise ValueError(f"consume must be 0 or 1, not {consume!r}")
    return consume


def check_callable(name: str, fn: Any) -> None:
    """Refuse what cannot be called."""
    if not callable(fn):
        raise TypeError(f"{name} must be callable, not {type(fn).__name__}")


def check_args(args: Any) -> tuple[Any, ...]:
    """Return positional arguments as a tuple."""
    if type(args) is tuple:
        return args
    try:
        iterator = iter(args)
    except TypeError:
        raise TypeError(f"args must be iterable, not {type(args).__name__}") from None
    return tuple(iterator)


def check_kwargs(kwargs: Any) -> dict[str, Any]:
    """Return keyword arguments as a plain dict; any Mapping will do."""
    if type(kwargs) is dict and not kwargs:
        return {}
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must be a mapping, not {type(kwargs).__name__}")
    found = dict(kwargs)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"kwargs must have str keys, not {name!r}")
    return found


def check_env(env: Env) -> dict[str, Optional[str]]:
    """Return the changes to make to ``os.environ``; a value of None unsets the name."""
    if isinstance(env, (str, bytes)):
        raise TypeError("env must be a mapping or pairs of (name, value), not a string")
    found: dict[str, Optional[str]] = {}
    try:
        pairs = iter(env.items() if isinstance(env, Mapping) else env)
    except TypeError:
        raise TypeError(
            f"env must be a mapping or pairs of (name, value), not {type(env).__name__}"
        ) from None
    for pair in pairs:
        if isinstance(pair, str):  # two letters are no pair
            raise TypeError(f"env must hold pairs of (name, value), not {pair!r}")
        try:
            name, value = pair
        except (TypeError, ValueError):
            raise TypeError(f"env must hold pairs of (name, value), not {pair!r}") from None
        checked = _check_name(name)
        found[checked] = _check_value(checked, value)
    return found


def _check_name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"env name {name!r} must be a str")
    if not name:
        raise ValueError("env name must not be empty")
    if "=" in name or "\0" in name:
        raise ValueError(f"env name {name!r} must not hold '=' or NUL")
    os.fsencode(name)  # UnicodeEncodeError, a ValueError, for what no environment can hold
    return name


def _check_value(name: str, value: Any) -> Optional[str]:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"env value of {name!r} must be a str or None, not {type(value).__name__}")
    if "\0" in value:
        raise ValueError(f"env value of {name!r} must not hold NUL")
    os.fsencode(value)
    return value


def check_pause(pause: Any) -> Optional[float]:
    """Return what a ``sleep_fn`` answered: None (go) or seconds to sleep, inf included."""
    if pause is None:
        return None
    seconds = math.nan
    # Text and buffers are no numbers, though float() reads them.
    if hasattr(pause, "__float__") or hasattr(pause, "__index__"):
        try:
            seconds = float(pause)
        except OverflowError:
            seconds = math.inf
        except (TypeError, ValueError):
            pass
    if math.isnan(seconds) or seconds < 0:
        raise ValueError(f"sleep_fn must return None or seconds >= 0, not {pause!r}")
    return seconds


def check_optional_callable(name: str, fn: Optional[Callable[..., Any]]) -> None:
    """Refuse what is neither None nor callable."""
    if fn is not None:
        check_callable(name, fn)
