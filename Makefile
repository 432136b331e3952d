# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
#
# Each target sets up all it needs, in $(VENV), and needs nothing but make, Python and pip for it.
# A stamp file says that a step is done, so that a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# What is run must not take this make for its jobserver, nor find our variables in its environment.
# Byte code is kept, and in one place: a spawned worker else compiles all that it imports, where the
# standard library came without.
unexport PYTHON VENV ARGS
CLEAN := env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL -u MAKEOVERRIDES -u PYTHONDONTWRITEBYTECODE \
  PYTHONPYCACHEPREFIX=$(abspath build/pycache)
PY := $(CLEAN) $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-input

# Named for the interpreter: another PYTHON makes the environment anew.
BASE := $(VENV)/.stamp-base-$(subst /,_,$(PYTHON))
INSTALLED := $(VENV)/.stamp-installed
GROUP := $(VENV)/.stamp-group-

# One environment, one pip at a time.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo mixed test test-all lint format types docs bench coverage changelog clean

help:
	@echo 'make demo      a recursive report on the standard library, each folder and file a job'
	@echo 'make mixed     C libraries built by make, ninja and Python jobs on the same slots'
	@echo 'make test      the tests on $(PYTHON); ARGS="-k name" goes to pytest'
	@echo 'make test-all  the tests on every interpreter at hand, from 3.9 to 3.14'
	@echo 'make lint      ruff: rules and format'
	@echo 'make format    ruff: mend what can be mended'
	@echo 'make types     mypy --strict, pyright, and completeness of the public types'
	@echo 'make docs      the documentation, in build/docs'
	@echo 'make bench     the benchmarks; ARGS go to them'
	@echo 'make coverage  the tests under coverage, workers included'
	@echo 'make changelog put the fragments of changelog.d into CHANGELOG.md'
	@echo 'make clean     remove all that make made'
	@echo 'PYTHON=... chooses the interpreter, VENV=... the place of its environment'

demo: $(INSTALLED)
	@$(PY) examples/archive_report.py $(ARGS)

mixed: $(INSTALLED) $(GROUP)mixed
	@$(PY) examples/mixed_build.py $(ARGS)

test: $(INSTALLED) $(GROUP)test
	@$(PY) -m pytest --junitxml=$(VENV)/junit.xml -o cache_dir=$(VENV)/.pytest_cache $(ARGS)

test-all:
	@$(CLEAN) $(PYTHON) tools/test_all.py $(ARGS)

lint: $(GROUP)lint
	@$(PY) -m ruff check $(ARGS)
	@$(PY) -m ruff format --check

format: $(GROUP)lint
	@$(PY) -m ruff check --fix $(ARGS)
	@$(PY) -m ruff format

# pyright asks the python on PATH where packages are, whatever it is run by.
types: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
types: export PATH := $(abspath $(VENV))/bin:$(PATH)
types: $(INSTALLED) $(GROUP)types
	@$(PY) -m mypy
	@$(PY) -m pyright
	@$(PY) -m pyright --verifytypes jobserver --ignoreexternal

docs: $(INSTALLED) $(GROUP)docs
	@$(PY) -m sphinx -n -W --keep-going -q -d build/doctrees docs build/docs
	@echo 'build/docs/index.html'

bench: $(INSTALLED) $(GROUP)bench
	@$(PY) benchmarks/run.py $(ARGS)

# A report, not a verdict: a worker that is measured takes longer to end than the tests allow for.
coverage: $(INSTALLED) $(GROUP)coverage
	@rm -rf build/coverage && mkdir -p build/coverage
	@$(PY) -m coverage run -m pytest $(ARGS) || echo 'The report follows nevertheless.'
	@$(PY) -m coverage combine -q
	@$(PY) -m coverage html -q
	@$(PY) -m coverage report

changelog: $(INSTALLED) $(GROUP)release
	@$(PY) -m towncrier build $(ARGS)

clean:
	rm -rf .venv .venv-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE):
	@echo 'Making $(VENV) for $(PYTHON)'
	@$(CLEAN) $(PYTHON) tools/make_venv.py $(VENV)
	@touch $@

$(INSTALLED): $(BASE) pyproject.toml src/jobserver/_version.py
	@$(PIP) --editable .
	@touch $@

$(GROUP)%: $(BASE) pyproject.toml
	@echo 'Installing into $(VENV) what is needed: $*'
	@$(PIP) --group $*
	@touch $@
