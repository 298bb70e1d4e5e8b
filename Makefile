# Everything a user or CI calls. `make setup` is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check bench model clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[openvino,data,dev]'
	@touch $@

demo: setup  ## quantize, compile and load-test the shipped model; prints one table
	$(BIN)/llmopt run demo/pipeline.yaml

test: setup  ## all tests, judges included; benchmarks are left to `make bench`
	$(BIN)/python -m pytest -q -m "not bench"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## the figures of README.md
	$(BIN)/python -m pytest -q -s -m bench tests/bench

model: setup  ## train the shipped model again (hours on a CPU; see demo/README.md)
	$(BIN)/python demo/train.py --out demo/model

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
