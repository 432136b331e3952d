# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The benchmarks: what is measured, how it is run in turn, and how it is shown."""

from __future__ import annotations
