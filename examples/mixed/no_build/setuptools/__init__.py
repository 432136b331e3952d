# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What pip finds as setuptools while it downloads the sources; see build_meta."""
