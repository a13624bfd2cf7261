# `make demo` and `make test` set everything up on a machine that has python3 (3.11 or later), make and a package index.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
CONSTRAINTS := constraints/python$(VERSION).txt
WORKERS ?= 2

.PHONY: demo test lint bench verify clean

demo: $(VENV)/experiments
	$(BIN)/python -m experiments demo

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25

bench: $(VENV)/experiments
	$(BIN)/python -m experiments bench

verify: $(VENV)/experiments
	$(BIN)/python -m experiments verify

$(CONSTRAINTS):
	@echo "no $(CONSTRAINTS): jaxreg is tested on the Pythons in constraints/ (PYTHON=python3.11 picks one)"; exit 1

# A stamp file per extra: installing again only when the requirements change.
$(VENV)/experiments $(VENV)/test: $(VENV)/%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv-* build *.egg-info .jax_cache runs
