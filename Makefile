# The project's commands. Python 3.11 or later and make are all that a machine needs: `.venv` is made on the first call,
# brought up to date when pyproject.toml or constraints.txt change, and made anew for another PYTHON.

PYTHON ?= python3
# where torch comes from; empty: where pip looks anyway. https://download.pytorch.org/whl/cpu has small CPU builds for
# Linux, where PyPI's are CUDA builds of some gigabytes
TORCH_INDEX ?=
# passed on: make demo ARGS="--bits 3", make test ARGS="-k grid"
ARGS ?=
# processes that run tests
JOBS ?= 2
# which versions; each file has an environment of its own: constraints-lowest.txt has .venv-lowest
CONSTRAINTS ?= constraints.txt

VENV := .venv$(subst constraints,,$(basename $(notdir $(CONSTRAINTS))))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a Python, or that which an environment was made with; the stamp has it, so that another one is noticed
WHICH := import sys; print(sys.implementation.cache_tag, sys.base_prefix)
WANTED := $(shell $(PYTHON) -c '$(WHICH)' 2>/dev/null)
ifneq ($(WANTED),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
# environments of `make package`, and of the scripts in engines/
PACKAGING := .venv-package/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help demo test slow gpu engines grids sync notebook quality style pages docs package venv clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP) ## Train SmolLM2-135M to 4 bits and compare it with rounding (5 minutes; ARGS="--help" for more)
	$(BIN)/python examples/demo.py $(ARGS)

# worksteal: each process has a half of the files in one piece, so that what a module's tests share is made once
# a GPU is hidden: a Trainer would take it, and these tests compare with what a CPU computes
test: $(STAMP) ## Run the tests that CI runs (ARGS="-k grid" for some of them)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

slow: $(STAMP) ## Run the tests that take longer than CI should
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -m slow $(ARGS)

gpu: $(STAMP) ## Run the tests of a GPU: its kernels, and trainings there
	$(BIN)/python -m pytest tests/gpu tests/ops tests/tuners/lowbit_sr $(ARGS)

engines: $(STAMP) ## One checkpoint in every format and engine (makes .venv-vllm, -gptq, -onnx: 6 GB, on the first call)
	$(PYTHON) engines/matrix.py $(ARGS)

grids: $(STAMP) ## Many grids, token by token: vLLM and llama.cpp beside transformers
	$(PYTHON) engines/run.py $(ARGS)
	$(BIN)/python engines/llama_cpp.py $(filter-out --%,$(ARGS))

sync: $(STAMP) ## Weights sent as TRL sends them, in a real vLLM: the tokens of the merged checkpoint's engine
	$(PYTHON) engines/sync.py $(ARGS)

notebook: $(STAMP) ## Run the notebook again and keep what it shows (installs Jupyter into .venv, on the first call)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[notebook]'
	$(BIN)/jupyter nbconvert --execute --inplace examples/*.ipynb

quality: $(STAMP) ## Check formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(STAMP) ## Format, and repair what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pages: $(STAMP) ## Write anew what pages take from code and from benchmarks/results
	$(BIN)/python -m tests.pages
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/diagrams.py

docs: $(STAMP) ## Build the documentation into site/ (ARGS="serve": show it on http://127.0.0.1:8000 while you write)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

package: .venv-package/.installed ## Build wheel and sdist into dist/, and check what they say and hold
	rm -rf build dist
	$(PACKAGING) build --no-isolation
	$(PACKAGING) twine check --strict dist/*
	$(PACKAGING) check_manifest --no-build-isolation

venv: $(STAMP) ## Only make .venv

clean: ## Remove all environments, builds and caches
	rm -rf .venv .venv-* site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-package/.installed: Makefile
	$(PYTHON) -m venv --clear .venv-package
	$(PACKAGING) pip install -q 'setuptools>=77' build==1.6.1 twine==7.0.0 check-manifest==0.51
	@touch $@

# torch first and alone: then nothing that follows can ask for another build of it. What it needs comes with the rest: an
# index of torch builds need not hold the versions that the constraints name
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed; say which: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@[ "$$($(BIN)/python -c '$(WHICH)' 2>/dev/null)" = "$(WANTED)" ] && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
		$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@echo '$(WANTED)' > $@
