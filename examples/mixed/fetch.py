# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The sources: downloaded once by pip, as its configuration has it, and checked each time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mixed.parts import PARTS, Part

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
PIN = re.compile(r"^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)

#: No dependency, no build: of an sdist that is not installed only the file is wanted.
DOWNLOAD = (
    *("download", "--quiet", "--disable-pip-version-check", "--no-input", "--retries=3"),
    *("--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"),
)


class FetchError(Exception):
    """The sources are not to be had."""


def pinned() -> dict[str, str]:
    """The file names of the sdists, and the SHA-256 of each."""
    pins = PIN.findall(REQUIREMENTS.read_text())
    return {f"{name}-{version}.tar.gz": digest for name, version, digest in pins}


def fetch(folder: Path) -> None:
    """Have all sdists in a folder; any number of processes may call this at the same time."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if all(is_good(folder / name, digest) for name, digest in pinned().items()):
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix="part-") as fresh:
            download(Path(fresh))
            for name, digest in pinned().items():
                if not is_good(Path(fresh, name), digest):
                    raise FetchError(f"pip has not brought {name} as it was asked to")
                # Whole or not at all, for those who look without the lock.
                Path(fresh, name).replace(folder / name)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who downloads into a folder."""
    with (folder / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def is_good(path: Path, digest: str) -> bool:
    """Whether a file is there and has this SHA-256."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == digest
    except FileNotFoundError:
        return False


def download(folder: Path) -> None:
    """Have pip put the sdists into a folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *DOWNLOAD, "-r", str(REQUIREMENTS), "-d", str(folder)],
        env={**os.environ, "PYTHONPATH": str(HERE / "no_build")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise FetchError(
            f"pip cannot download the sources: {complaint(done.stderr)}\n"
            "They are needed once, from the index that pip is configured for; later runs do"
            " without a network."
        )


def complaint(text: str) -> str:
    """What pip says is wrong, in one line: its last error, or all that it has said."""
    return " ".join(text.rpartition("ERROR:")[2].split()) or "no reason given"


def unpack(sdists: Path, sources: Path) -> None:
    """Write the sources of all parts."""
    for part in PARTS:
        unpack_part(sdists / f"{part.sdist}.tar.gz", part, sources / part.name)


def unpack_part(sdist: Path, part: Part, folder: Path) -> None:
    """Write the sources of one part.

    Files are read out of the archive and written here, so it decides about no path, link or mode.
    """
    with tarfile.open(sdist) as archive:
        for member in archive:
            inner = part.owns(PurePosixPath(member.name))
            stream = archive.extractfile(member) if member.isreg() else None
            if inner is not None and stream is not None:
                path = folder / inner
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
    missing = [name for name in part.files if not (folder / name).is_file()]
    if missing:
        raise FetchError(f"{sdist.name} has no {', '.join(missing)}")
