# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The one place that states the version."""

__version__ = "0.1.0"
