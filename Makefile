# The two commands of this project: `make tune` and `make test`. VENV and PYTHON may be given: make test VENV=/somewhere.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: tune test test-all test-fast lint docs install clean

tune: install
	$(BIN)/python pipelines/tune_cityscapes.py

# Everything but the slow tests, which stop drivers, workers and nodes on purpose or train for long.
test: install
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "not slow"

# Every test; what continuous integration runs.
test-all: install
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

# Eight of ten tests, in two minutes: none that starts Ray, is slow, or takes longer than 0.12 s (tests/long_tests.py).
test-fast: install
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "not slow" tests/unit @tests/long_tests.txt

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into build/site; a warning is an error.
docs: install
	$(BIN)/mkdocs build --strict

# Dependencies once per pyproject.toml; the link to this checkout every time (an environment may be shared by clones).
install: $(VENV)/dependencies-installed
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .

$(VENV)/dependencies-installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/pip install --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
