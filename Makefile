# The whole set-up: `make run` does the main job, `make test` installs what tests need and runs them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/smollm2-135m-lora.yaml
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: run test test-all test-ray torture check format install install-dev clean

run: install  ## fine-tune the default model on the shipped data
	$(BIN)/python main.py $(CONFIG)

test: install-dev  ## every test but the slow ones on the real model
	$(BIN)/python -m pytest -m "not slow" --hypothesis-profile=same

test-all: install-dev  ## the slow ones too
	$(BIN)/python -m pytest

test-ray: install-dev  ## what needs Ray: several workers, serve --ray, submit (installs Ray, 0.4 GB)
	$(PIP) --editable '.[ray]'
	$(BIN)/python -m pytest tests/flows/test_workers_flow.py tests/flows/test_sharded_flow.py tests/flows/test_ray_flow.py tests/flows/test_submit_flow.py \
		tests/unit/cluster tests/unit/jobs tests/unit/serving/test_remote_engine.py

torture: install-dev  ## kill 200 runs at random instants, resume them, compare every bit (20 minutes)
	$(BIN)/python tests/torture/torture.py --instants 200

check: install-dev  ## format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not flow"

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("tunesmith needs Python 3.11 or newer: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard src/tunesmith/native/*.[ch]) | $(VENV)/bin/python
	@echo "Installing tunesmith into $(VENV) (about 200 MB to fetch, once)"
	$(PIP) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing what the tests need"
	$(PIP) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/*.egg-info
