# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The parts of mixed_build.py, in the order in which to read them.

- `parts`: what is built, of which source, by which builder
- `fetch`: the sources, from pip's index to the files that are compiled
- `tools`: the compiler and the builders of this machine
- `builders`: one way to build each: a Makefile, a build.ninja, nested Python jobs
- `jobs`: all jobs of the build, from the first compiler to the zip
- `census`: which processes work in a folder, and how many compilers there are among them
- `killer`: the end of a make in the middle of its work
- `foreman`: the main program's view of it all
- `show`: progress, the table and the JSON object
"""
