# Every target sets up what it needs in .venv, with the versions of constraints.txt. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Build tools live in the environment too: with them pip needs no isolated build, and recompiles only what changed.
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# CUDA kernels where a GPU can run them: nvcc takes minutes. `bench/resources.py` compiles them in any case.
CUDA = $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo ON || echo OFF)
EDITABLE = $(INSTALL) --no-build-isolation --config-settings=build-dir=$(VENV)/build \
  --config-settings=cmake.define.MTLGRAD_CUDA=$(CUDA) --editable
# In a fresh clone every process would compile our modules again, and inductor's compiler optimise what runs once.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= TORCHINDUCTOR_DEBUG_COMPILE=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal
C_FILES = $(shell find csrc tests/simt -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo test test-all drivers resources lint format docs wheel clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*##/make \1:/p' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## Compare four methods on eight river flows (DEMO_ARGS="--epochs 2 ...")
	$(BIN)/mtlgrad train --recipe river --methods sum logsum bayesagg aligned-ub --lr 8e-3 --epochs 25 $(DEMO_ARGS)

test: $(VENV)/installed-dev  ## Run all tests but the slow ones, JOBS=2 at a time, CUDA kernels in the host emulator (TEST_ARGS="-k moments ...")
	$(BIN)/python tests/simt/build.py _C
	$(PYTEST) $(TEST_ARGS)

test-all: drivers resources  ## Run the slow ones, too: sanitizers, what nvcc makes of the CUDA kernels, the sdist
	$(PYTEST) -m '' $(TEST_ARGS)

drivers: $(VENV)/installed-dev
	$(BIN)/python tests/simt/build.py all

resources: $(VENV)/installed-dev
	! command -v nvcc >/dev/null || $(BIN)/python -m bench.resources >/dev/null

lint: $(VENV)/installed-dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## Apply the style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

docs: $(VENV)/installed-docs  ## Build the site in build/site, its tutorials run anew, one thread
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/installed-dev  ## Make a wheel in dist/, check it under torch 2.13 and the newest (WHEEL_ARGS="--torch torch==2.11.0")
	$(BIN)/python tools/wheel.py $(WHEEL_ARGS)

clean:  ## Remove everything that make made, the environment too
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Python files are read where they lie; what is compiled is installed again when it changes.
$(VENV)/installed: $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mtlgrad needs Python 3.10 or newer: make PYTHON=python3.X" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "$(PYTHON) has no headers to build an extension with: apt install python3-dev" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch and building mtlgrad in $(VENV) (the first time takes some minutes)"
	@$(INSTALL) pip scikit-build-core pybind11 cmake ninja
	@$(EDITABLE) '.[train]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	@echo "installing what tests and linters need"
	@$(EDITABLE) '.[test,dev]'
	@touch $@

$(VENV)/installed-docs: pyproject.toml constraints.txt | $(VENV)/installed-dev
	@echo "installing what the site needs"
	@$(EDITABLE) '.[docs]'
	@touch $@
