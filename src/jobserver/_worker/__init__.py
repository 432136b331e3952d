# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""What runs in a worker process; imports next to nothing of the rest."""
