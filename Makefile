# Each target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-all lint bench

venv: .venv/made

.venv/made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/made
	$(BIN)/python train.py

# The quick tests, on two cores.
test: .venv/made
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

# The tests that `make test` leaves out: each repeats a proof of a quick one at greater length. Both are the whole suite.
test-all: .venv/made
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m slow

bench: .venv/made
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/bench.py

lint: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python
