# What one does with this project. `make` lists it.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 3
ARGS ?=

PY := $(VENV)/bin/python
# One thread per test process: they run side by side, and small models gain nothing from more. Three of them keep two
# cores busy, as some tests wait for other processes.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help run test check format env figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/.installed ## set up, then train FSL-SAGE on the embedded digits; ARGS="rounds=50 lr=0.01" changes settings
	$(PY) main.py $(ARGS)

test: check ## set up, then run every check: lint, format, types, tests
	$(THREADS) $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(VENV)/.installed-dev ## set up, then run every check but the tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: $(VENV)/.installed-dev ## rewrite the sources as ruff wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

env: $(VENV)/.installed-dev ## set up only: the environment with everything that development needs

figures: $(VENV)/.installed ## draw figures and tables of the finished runs in saves/
	$(PY) plot_results.py $(ARGS)

clean: ## remove the environment and caches; saves/ and data/ stay
	rm -rf $(VENV) cutlayer.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps make a second call quick; pyproject.toml holds the one list of dependencies.
$(VENV)/.installed: pyproject.toml
	$(call environment)
	$(PY) -m pip install --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(call environment)
	$(PY) -m pip install --editable ".[dev]"
	@touch $@ $(VENV)/.installed

# A virtual environment with pip in it, from a Python that is new enough.
new_enough = $(shell $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))' 2>/dev/null)
define environment
$(if $(filter True,$(new_enough)),,$(error Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=/path/to/python3.11 ...))
@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
endef
