# Every target sets up what it needs, and re-uses what an earlier call made.
#
#   PYTHON               the interpreter that .venv is made with (default: python3)
#   PYTEST_ARGS          further arguments of the test targets, such as PYTEST_ARGS="-k blend"
#   TEST_WORKERS         processes that the tests are distributed over (default: 2)
#   MATRIX               combinations that `make test-matrix` runs, such as MATRIX=3.12:0.19.2, or
#                        MATRIX=3.11:0.16.1:2.6.0 with a version of torch
#   SECONDS, SEED        how long and from which seed `make fuzz` runs
#   QUICK                QUICK=1 runs the short form of `make study`
#   PIP_EXTRA_INDEX_URL  on a machine without a GPU: the PyTorch CPU wheel index, see CONTRIBUTING.md

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build test test-fast test-all test-matrix docs lint format demo demo-short smollm2 study sanitize chaos fuzz clean

PYTHON ?= python3
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
MATRIX ?=
SECONDS ?= 120
SEED ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

# What the tests' golden values and the demo were made with. The package itself accepts other
# versions, see pyproject.toml.
TORCH_VERSION := 2.13.0
MEGATRON_CORE_VERSION := 0.16.1
OLDEST_PYTHON := (3, 10)
NEWEST_PYTHON := (3, 13)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CSRC := $(shell find csrc -name '*.h' -o -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2> /dev/null)

help: ## show this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(INSTALLED) ## make .venv with everything that development needs

build: $(BUILT) ## compile the extensions in place

# One thread per process, because the workers share the cores. A file's tests stay in one worker, so
# that its expensive fixtures are made once. xdist's own order, by number of tests, pairs jobs of
# several ranks with unit tests; sorted by folder, two such jobs would share the cores and be slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(TEST_WORKERS) --dist loadfile

test-fast: $(BUILT) ## run the unit tests except the slow ones
	$(PYTEST) -m 'not slow' tests/unit $(PYTEST_ARGS)

test: $(BUILT) ## run what must pass before a change is accepted: all tests except the slow ones
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: $(BUILT) ## run every test
	$(PYTEST) $(PYTEST_ARGS)

test-matrix: ## run the fast tests on every Python present, with every version of megatron-core and with older torch
	tests/matrix.sh $(MATRIX)

lint: $(INSTALLED) ## check style, types and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(CSRC),$(BIN)/clang-format --dry-run -Werror $(CSRC))

docs: $(INSTALLED) ## build the documentation in build/site, strictly
	$(BIN)/python tools/docs_reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(INSTALLED) ## format every file in place
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

demo: $(BUILT) ## real text to a trained, resumed, exported model in runs/tiny_cpu (about 15 minutes)
	$(BIN)/python examples/tiny_cpu/demo.py

demo-short: $(BUILT) ## the same with few iterations (about 5 minutes)
	$(BIN)/python examples/tiny_cpu/demo.py --short

smollm2: $(BUILT) ## SmolLM2-135M into Chinese, with and without new tokens, in runs/smollm2_zh (hours)
	$(BIN)/python examples/smollm2_zh/demo.py

study: $(BUILT) ## schedules compared at equal data, in runs/transfer_study (hours; QUICK=1: 15 minutes)
	$(BIN)/python -m examples.transfer_study $(if $(QUICK),--quick)

sanitize: $(BUILT) ## run the tests of the C++ code under the address and undefined-behaviour sanitizers
	PATH="$(abspath $(BIN)):$$PATH" tests/sanitize.sh
	csrc/fuzz.sh 20

chaos: $(BUILT) ## thirty kills of one run, which has to end where an undisturbed one ends (about 6 minutes)
	PYTHONPATH=tests:tests/distributed $(BIN)/python tests/distributed/chaos.py runs/chaos --kills 30

fuzz: $(BUILT) ## damaged files of every kind, for SECONDS=120 from SEED=1 (ONLY=kinds, REPLAY=finding)
	PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m fuzz --seconds $(SECONDS) --seed $(SEED) \
	$(addprefix --only ,$(ONLY)) $(if $(REPLAY),--replay $(REPLAY))

clean: ## remove .venv, build outputs and caches; runs and downloaded text stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find megatron_chatflow tools tests examples -name __pycache__ -prune -exec rm -rf {} +
	find megatron_chatflow -name '*.so' -delete

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if $(OLDEST_PYTHON) <= sys.version_info[:2] <= $(NEWEST_PYTHON) else \
	"error: %s is Python %d.%d; megatron-core has wheels for 3.10 to 3.13: make PYTHON=python3.11" \
	% (sys.executable, *sys.version_info[:2]))'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that no resolver reaches for another build of it; the project is
# built in this environment and not in an isolated one, where pip might fetch torch again.
$(INSTALLED): pyproject.toml setup.py Makefile | $(BIN)/python
	@command -v c++ g++ clang++ > /dev/null || { echo "error: no C++ compiler; install g++" >&2; exit 2; }
	@echo "Installing torch $(TORCH_VERSION) and what the project needs into $(VENV): some minutes"
	$(BIN)/pip install -qq torch==$(TORCH_VERSION)
	$(BIN)/pip install -qq --only-binary megatron-core megatron-core==$(MEGATRON_CORE_VERSION) \
	|| { echo "error: no megatron-core $(MEGATRON_CORE_VERSION), see above; it has wheels for Linux" >&2; exit 2; }
	$(BIN)/pip install -qq 'setuptools>=77' wheel 'pybind11>=2.12'
	$(BIN)/pip install -qq --no-build-isolation --editable '.[dev]' \
	torch==$(TORCH_VERSION) megatron-core==$(MEGATRON_CORE_VERSION)
	@touch $@ && touch $(BUILT)

# The installation has just compiled everything when it ran in the same call. By force, because
# setuptools does not see that a header changed.
$(BUILT): $(INSTALLED) $(CSRC)
	@[[ -e $@ && -z "$$(find $^ -newer $@)" ]] || { echo "compiling csrc"; $(BIN)/python setup.py --quiet build_ext --inplace --force; }
	@touch $@
