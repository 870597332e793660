# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow smoke lint install clean

demo: install
	$(BIN)/mergectl run digits

# The tests of a file stay in one process, so that what they share is made once.
test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

# Kill tests, smoke runs of pipelines and other tests of several seconds each.
test-slow: install
	$(BIN)/python -m pytest -n auto -m slow

# The pipelines of all five papers on tiny models and sample rows, offline, in one process.
smoke: install
	cd $$(mktemp -d) && HF_HUB_OFFLINE=1 $(CURDIR)/$(BIN)/mergectl --threads 1 run --smoke

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch first and pinned: what needs it would otherwise bring a CUDA build along.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) lab .pytest_cache .mypy_cache .ruff_cache .hypothesis
