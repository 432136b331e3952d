# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What is built: three C libraries, each in its own way."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import NamedTuple


class Part(NamedTuple):
    """One library."""

    name: str
    #: The source distribution that has the sources, and where they are in it.
    sdist: str
    folder: str
    #: What is compiled.
    files: tuple[str, ...]
    #: Folders with what that includes.
    headers: tuple[str, ...]
    flags: tuple[str, ...]
    #: "make", "ninja" or "jobs".
    builder: str

    @property
    def archive(self) -> str:
        """The file name of the library."""
        return f"lib{self.name}.a"

    @property
    def compilations(self) -> list[tuple[str, str]]:
        """The names of the objects, and the sources as they are named in the part's folder."""
        return [
            (source.replace("/", "-")[:-2] + ".o", f"../../sources/{self.name}/{source}")
            for source in self.files
        ]

    def owns(self, name: PurePosixPath) -> PurePosixPath | None:
        """Where below the sources of this part a member of the sdist belongs; None if nowhere."""
        top = PurePosixPath(self.sdist, self.folder)
        if top not in name.parents or name.suffix not in (".c", ".h") or ".." in name.parts:
            return None
        inner = name.relative_to(top)
        return inner if str(inner) in self.files or str(inner.parent) in self.headers else None


def within(folder: str, names: str) -> tuple[str, ...]:
    """C files of one folder."""
    return tuple(f"{folder}/{name}.c" for name in names.split())


# Not optimised, so that the compilers take two seconds of CPU in all. NDEBUG, since an assertion
# would put the name of its source into the object.
COMMON = ("-O0", "-DNDEBUG", "-fPIC")

PARTS = (
    # The decoder alone, as the library's own ZSTD_LIB_COMPRESSION=0 has it: a whole library of a
    # dozen objects, enough for its make to be killed in between.
    Part(
        "zstd",
        "zstandard-0.14.1",
        "zstd",
        within(
            "common",
            "debug entropy_common error_private fse_decompress pool threading xxhash zstd_common",
        )
        + within("decompress", "huf_decompress zstd_ddict zstd_decompress zstd_decompress_block"),
        (".", "common", "decompress"),
        (*COMMON, "-DXXH_NAMESPACE=ZSTD_"),
        "make",
    ),
    # All of it.
    Part(
        "lz4",
        "lz4-4.4.5",
        "lz4libs",
        ("lz4.c", "lz4hc.c", "lz4frame.c", "xxhash.c"),
        (".",),
        (*COMMON, "-DXXH_NAMESPACE=LZ4_"),
        "ninja",
    ),
    # The library, and what its command line tool is made of; not the variant for one processor.
    Part(
        "xxhash",
        "xxhash-3.6.1",
        "deps/xxhash",
        (
            "xxhash.c",
            *within("cli", "xsum_bench xsum_os_specific xsum_output xsum_sanity_check xxhsum"),
        ),
        (".", "cli"),
        COMMON,
        "jobs",
    ),
)
