# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The parts of archive_report.py, in the order in which to read them.

- `report`: what is known of a file, and how a folder's report comes from its children's
- `measure`: the report of one file: the work itself
- `folders`: the report of a folder, whoever makes the reports of its children
- `crew`: its children as nested jobs that share the slots of one Jobserver
- `journal`: what the jobs write down about themselves: for progress, and as proof
- `foreman`: the main program's view of it all, from the first job to the last orphan
- `show`: progress, the table and the JSON object
"""
