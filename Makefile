# Run `make` for the list of targets.
PYTHON ?= python3
# where torch's CPU build comes from, if not from pip's own index: make setup TORCH_INDEX=URL
TORCH_INDEX ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
# two files of tests at a time; make test PARALLEL= runs one test after the other. Three save a minute where nothing else runs, and tests
# that watch a server at work begin to depend on the machine
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test ci lint format typecheck clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## the virtual environment in .venv, with the server runtime; quick when done already

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in ((3, 11), (3, 12)) else \
		"this is Python %d.%d, for which the server runtime has no stub; use 3.11 or 3.12: make setup PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if ! command -v nvidia-smi >/dev/null; then \
		echo "no GPU here: asking for torch's CPU build"; \
		$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0+cpu 2>/dev/null || { \
		echo "pip finds none: taking its default build, which carries CUDA (some GB; TORCH_INDEX=URL names an index of CPU builds)"; \
		$(BIN)/python -m pip install --quiet torch==2.13.0; }; fi
	@echo "installing turbotriton and what it needs; this takes some minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m turbotriton.cli.server_runtime
	@touch $@

demo: setup ## convert the bundled model, serve it with tritonserver, ask it, chat
	$(BIN)/turbotriton demo

test: setup ## the test suite without the slow tests: no GPU, no network
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

ci: setup lint typecheck ## all that CI runs
	$(BIN)/python -m pytest $(PARALLEL)

lint: setup ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: setup ## let ruff format the code
	$(BIN)/ruff format .

typecheck: setup ## mypy, strict
	$(BIN)/mypy

clean: ## remove what the targets above made
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
