# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Slots: tokens, where they are, and who runs on which."""
