# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The machine and the versions that a session ran with: figures mean nothing without them."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def describe() -> dict[str, str]:
    """What decides how fast processes start and data moves."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "memory": _memory(),
        "kernel": f"{platform.system()} {platform.release()}",
        "frequency governor": _read(
            "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "not told"
        ),
        "huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "C library": " ".join(platform.libc_ver()) or "unknown",
    }


def load() -> str:
    """How many processes wanted to run, on average, in the last minute."""
    return f"{os.getloadavg()[0]:.2f}"


def commit(root: Path) -> str:
    """The commit of the checkout, with a plus if files have changed since; nothing without git."""
    try:
        git = ["git", "-C", str(root)]
        quiet: Any = {"text": True, "stderr": subprocess.DEVNULL}
        head: str = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], **quiet)
        changed = subprocess.check_output([*git, "status", "--porcelain", "src"], **quiet)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.strip() + ("+" if changed else "")


def _read(path: str, default: str = "") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def _field(path: str, name: str) -> str:
    for line in _read(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _memory() -> str:
    kilobytes = _field("/proc/meminfo", "MemTotal").split()
    return f"{int(kilobytes[0]) / (1 << 20):.0f} GB" if kilobytes else "unknown"


def _chosen(path: str) -> str:
    """Return the word in brackets."""
    return _read(path).partition("[")[2].partition("]")[0] or "not told"
