# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A build backend that builds nothing.

To download an sdist pip has its backend tell the metadata: it would install what is needed for a
build, and run code of the sdist. But an sdist comes with its metadata, in PKG-INFO.
"""

from __future__ import annotations

import shutil
import sys
from email import message_from_bytes
from pathlib import Path


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:  # noqa: ARG001  # the hook's own name
    """Nothing."""
    return []


def prepare_metadata_for_build_wheel(directory: str, config_settings: object = None) -> str:  # noqa: ARG001  # the hook's own name
    """Copy the metadata of the sdist in the current directory; the name of the copy's folder."""
    source = Path("PKG-INFO")
    found = message_from_bytes(source.read_bytes())
    folder = Path(directory, f"{found['Name'].replace('-', '_')}-{found['Version']}.dist-info")
    folder.mkdir()
    shutil.copyfile(source, folder / "METADATA")
    return folder.name


#: What pip asks for where an sdist names no backend.
__legacy__ = sys.modules[__name__]
