# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""All jobs of the build: libraries, then their symbols and hashes, then one zip of it all."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import zipfile
from typing import TYPE_CHECKING, NamedTuple

from mixed.builders import BuildError, Built, Site, build
from mixed.parts import PARTS

if TYPE_CHECKING:
    from pathlib import Path

ZIP = "mixed.zip"


class Artefact(NamedTuple):
    """A file that has come of it."""

    name: str
    size: int
    sha256: str


class Outcome(NamedTuple):
    """What the first job returns."""

    built: list[Built]
    #: How many global symbols each library defines.
    symbols: dict[str, int]
    artefacts: list[Artefact]
    zip: Artefact


def build_all(site: Site) -> Outcome:
    """The first job, which submits the others."""
    jobserver = site.jobserver
    (site.root / "artefacts").mkdir()
    futures = [jobserver(build, site, part) for part in PARTS]
    built = [future.result() for future in futures]
    tables = jobserver.map(tell_symbols, [(site, one) for one in built])
    symbols = {one.part.archive: count for one, count in zip(built, tables)}
    paths = sorted((site.root / "artefacts").iterdir())
    artefacts = list(jobserver.map(measure, [(path,) for path in paths]))
    packed = jobserver(pack, site, artefacts).result()
    return Outcome(built, symbols, artefacts, packed)


def tell_symbols(site: Site, built: Built) -> int:
    """A job: put a library among the artefacts, and beside it a table of its symbols."""
    source = site.room(built.part) / built.part.archive
    target = site.root / "artefacts" / source.name
    shutil.copyfile(source, target)
    done = subprocess.run(
        [site.tools.nm, "--defined-only", "--extern-only", "--format=posix", source.name],
        env={**os.environ, "LC_ALL": "C"},
        cwd=target.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"nm fails on {source.name}: {done.stderr.strip()}")
    # A line is a name, a kind, and where in its object it is; that of an object has one word.
    words = [line.split() for line in done.stdout.splitlines()]
    table = sorted(f"{found[1]} {found[0]}" for found in words if len(found) > 1)
    target.with_suffix(".symbols").write_text("".join(f"{line}\n" for line in table))
    return len(table)


def measure(path: Path) -> Artefact:
    """A job: the size and the hash of a file."""
    data = path.read_bytes()
    return Artefact(path.name, len(data), hashlib.sha256(data).hexdigest())


def pack(site: Site, artefacts: list[Artefact]) -> Artefact:
    """A job: one zip of all artefacts and their hashes, the same bytes from the same artefacts.

    So nothing in it tells when or in which order things were done; and nothing is compressed, as
    one zlib does not do that as the next.
    """
    listing = "".join(f"{one.sha256}  {one.name}\n" for one in artefacts).encode()
    target = site.root / ZIP
    with zipfile.ZipFile(target, "w") as archive:
        for one in artefacts:
            data = (site.root / "artefacts" / one.name).read_bytes()
            archive.writestr(zipfile.ZipInfo(one.name), data)
        archive.writestr(zipfile.ZipInfo("SHA256SUMS"), listing)
    return measure(target)
