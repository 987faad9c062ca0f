# `make serve` and `make test` set everything up by themselves, in .venv; both are quick when nothing changed.
# Without a CUDA device, PIP_EXTRA_INDEX_URL may name PyTorch's CPU index: its wheels are much smaller.
VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; print("$(p)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
ARGS ?=

.PHONY: help install serve test test-faults soak check lint types imports size generated docs proto format bench clean
help:
	@echo "make serve [ARGS='MODEL --prefill 1 --decode 2']   set up and serve (the demo model when none is named)"
	@echo "make test  [ARGS='-k name']                        set up and run the tests"
	@echo "make test-faults                                   kill, cut, corrupt and overload a cluster; ten minutes"
	@echo "make soak  [ARGS='--minutes 60']                   a fault every half minute, for as long as you like"
	@echo "make check                                         lint, format, types, import contracts, size, protobuf"
	@echo "make install | format | proto | docs | bench [ARGS=…] | clean"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Tandem needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(RUNTIME)

install: $(RUNTIME)

serve: $(RUNTIME)
	@exec $(BIN)/tandem serve $(ARGS)

test: $(DEV)
	$(BIN)/pytest --ignore tests/faults $(ARGS)

test-faults: $(DEV)
	$(BIN)/pytest tests/faults $(ARGS)

soak: $(DEV)
	$(BIN)/python tests/faults/soak.py $(ARGS)

check: lint types imports size generated

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEV)
	$(BIN)/pyright

imports: $(DEV)
	$(BIN)/lint-imports --no-logo

size: $(DEV)
	$(BIN)/python scripts/check_size.py

generated: $(DEV)
	$(BIN)/python scripts/proto.py --check
	$(BIN)/python scripts/configuration.py --check

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV)
	$(BIN)/python scripts/configuration.py

proto: $(DEV)
	$(BIN)/python scripts/proto.py

bench: $(DEV)
	$(BIN)/tandem bench $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
