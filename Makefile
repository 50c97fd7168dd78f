# jaxds2: `make` lists the targets. Everything runs in .venv, which the project makes for itself.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1  /p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned packages (CPU)

# The lock is installed with --no-deps: pyctcdecode pins numpy < 2 but runs on numpy 2.
$(STAMP): requirements/cpu.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "jaxds2 needs Python 3.11, 3.12 or 3.13, this is " + sys.version.split()[0] + "; say which with: make PYTHON=python3.12 " + "setup")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV), half a minute to a few minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/cpu.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup ## prepare the spoken demo corpus, train on it, evaluate unseen voices
	$(VENV)/bin/python -m jaxds2 demo

test: setup ## run the tests
	$(VENV)/bin/python -m pytest

lint: setup ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
