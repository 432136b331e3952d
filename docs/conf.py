# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""How Sphinx builds the documentation."""

from __future__ import annotations

import zlib
from pathlib import Path

import jobserver

project = "jobserver"
author = "The jobserver authors"
copyright = "The jobserver authors"
version = release = jobserver.__version__

HERE = Path(__file__).parent
BUILD = HERE.parent / "build"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "fieldlist"]
myst_heading_anchors = 3
nitpicky = True
# Type variables and aliases have no page of their own.
nitpick_ignore_regex = [("py:(class|obj)", r"(jobserver\._\w+\.)?([A-Z]_?(co)?|Command)")]

html_theme = "furo"
html_title = f"jobserver {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def python_inventory() -> Path:
    """Compile the names of the standard library that we link to into an inventory for intersphinx.

    The inventory that the Python documentation publishes would have to be fetched, and a build
    must not depend on the network.
    """
    lines = [
        line for line in (HERE / "python-names.txt").read_text().splitlines() if line[:1] != "#"
    ]
    head = "# Sphinx inventory version 2\n# Project: Python\n# Version: 3\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    body = "".join(f"{line} -\n" for line in lines if line)
    BUILD.mkdir(exist_ok=True)
    target = BUILD / "python.inv"
    target.write_bytes(head.encode() + zlib.compress(body.encode()))
    return target


intersphinx_mapping = {"python": ("https://docs.python.org/3", str(python_inventory()))}
