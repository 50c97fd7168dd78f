# jaxds2: `make` lists the targets. Everything runs in .venv, which the project makes for itself.
PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
BENCH := .venv-bench
# On Linux most indexes' torch for x86-64 brings gigabytes of CUDA, so only a CPU build is installed unasked. Where pip finds
# none, name an index that has them, or ask for the other build: make bench TORCH='torch==2.13.0 --index-url URL'
CPU_BUILD := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),+cpu)
TORCH ?= torch==2.13.0$(CPU_BUILD)
# torchaudio goes with one torch only, so log-mel is timed in an environment of its own.
BENCH_AUDIO := .venv-bench-audio
TORCHAUDIO ?= torch==2.9.1$(CPU_BUILD) torchaudio==2.9.1$(CPU_BUILD)

.DEFAULT_GOAL := help
.PHONY: help setup demo test stress lint bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1  /p' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install the pinned packages (CPU)

# The lock is installed with --no-deps: pyctcdecode pins numpy < 2 but runs on numpy 2.
$(STAMP): requirements/cpu.lock pyproject.toml
	@'$(PYTHON)' -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "jaxds2 needs Python 3.11, 3.12 or 3.13, this is " + sys.version.split()[0] + "; say which with: make PYTHON=python3.12 setup")'
	@'$(PYTHON)' -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments: install its venv package (Debian: apt install python3-venv)"; exit 1; }
	'$(PYTHON)' -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV), half a minute to a few minutes"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/cpu.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: setup ## prepare the spoken demo corpus, train on it, evaluate unseen voices
	@$(VENV)/bin/python -m jaxds2 demo || { status=$$?; [ $$status != 75 ] || echo "stopped, everything is saved: make demo goes on"; exit $$status; }

test: setup ## run the tests; some of them: make test TESTS=tests/test_scan.py
	$(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile $(TESTS)

stress: setup ## kill, damage and fill up training runs, which must all recover: minutes
	$(VENV)/bin/python tests/stress.py

lint: setup ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

$(BENCH)/.installed: PEER := TORCH
$(BENCH_AUDIO)/.installed: PEER := TORCHAUDIO
$(BENCH)/.installed $(BENCH_AUDIO)/.installed: %/.installed: requirements/cpu.lock pyproject.toml
	'$(PYTHON)' -m venv $*
	@echo "installing the pinned packages and torch into $*"
	$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements/cpu.lock
	@if $*/bin/python -m pip install --quiet --disable-pip-version-check $($(PEER)); then touch $@; else \
	    echo "no $($(PEER)): going on without it. Any build, with CUDA too: make bench $(PEER)='$(subst +cpu,,$($(PEER)))'"; fi

bench: $(BENCH)/.installed $(BENCH_AUDIO)/.installed ## time our forms beside those of optax, torch, librosa and torchaudio
	@set -e; for script in benchmarks/bench_*.py; do \
	    case $$script in *features*) venv=$(BENCH_AUDIO) ;; *) venv=$(BENCH) ;; esac; \
	    echo; echo "== $$script"; $$venv/bin/python $$script; \
	done

clean: ## remove the environments and caches; data/ and runs/ stay
	rm -rf $(VENV) $(BENCH) $(BENCH_AUDIO) .pytest_cache .ruff_cache .hypothesis
