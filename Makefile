# make demo   the whole main job on the embedded digits (ARGS="--quick --out DIR" and the like are passed on)
# make test   everything that CI checks
# Nothing is needed but Python 3.11 or newer and make; everything is installed into .venv.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test install lint clean

help:
	@sed -n '1,3s/^# //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "hasten needs Python 3.11 or newer; run make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps make an install happen once, and again when what is to be installed changes.
# torch comes first, in the build for this machine: the default (CUDA) build where nvidia-smi answers, else the much
# smaller CPU build where its index can be reached; where not, giving up at once costs nothing and the default works.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@if [ "$$(uname -s)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) install --progress-bar off $(TORCH); \
	else \
	  $(PIP) install --progress-bar off --retries 0 --timeout 5 \
	    --extra-index-url https://download.pytorch.org/whl/cpu $(TORCH) \
	  || $(PIP) install --progress-bar off $(TORCH); \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/hasten demo $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m pytest -n 2 $(ARGS)
	$(BIN)/python tests/mutate.py --changed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
