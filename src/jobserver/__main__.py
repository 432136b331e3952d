# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""``python -m jobserver``: the same as the command ``jobserver``."""

from __future__ import annotations

import sys

from jobserver._tool import main

if __name__ == "__main__":
    sys.exit(main())
