# Everything a visitor runs. `make` alone lists the targets.
#
#   PYTHON  interpreter that creates the environment, 3.11 or newer (with uv: a version will do, such as 3.12)
#   VENV    folder of the environment
#   RUNS    folder of the demo's runs
#   STEPS   training steps of a shortened demo, in a workdir of its own

PYTHON = python3
VENV = .venv
RUNS = runs
STEPS =

BIN = $(VENV)/bin
READY = $(VENV)/.ready
UV = $(shell command -v uv 2> /dev/null)
DEMO = $(RUNS)/demo$(if $(STEPS),-$(STEPS))
# A short run warms up for a sixth of itself, about as the whole demo does.
SHORT = $(if $(STEPS),--config.training.steps=$(STEPS) --config.training.optimizer.warmup_steps=$$(( $(STEPS) / 6 )))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-faults lint bench clean

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

install: $(READY)  ## Creates the environment, with uv where there is one, else with venv and pip.

demo: $(READY)  ## Trains SortedNet on Python's own source code, evaluates every sub-model, draws the picture.
	@"$(BIN)/python" train.py --config=configs/sorted_net_demo.py --workdir="$(DEMO)" $(SHORT)
	@"$(BIN)/python" eval.py --workdir="$(DEMO)"

test: $(READY)  ## Runs the test suite on all cores.
	"$(BIN)/python" -m pytest -n auto --dist worksteal

test-slow: $(READY)  ## Runs the tests that `make test` leaves out because they take long.
	"$(BIN)/python" -m pytest -n auto --dist worksteal -m 'slow and not faults'

test-faults: $(READY)  ## Kills runs and their processes, and looks whether anything was lost.
	"$(BIN)/python" -m pytest -m faults -rA tests/faults

lint: $(READY)  ## Checks style, format and the direction of imports.
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/lint-imports"

bench: $(READY)  ## Times the training step against a plain hand-written one.
	"$(BIN)/python" benchmarks/dense_step.py

clean:  ## Removes the environment and all caches; keeps the runs.
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	rm -rf build dist adaptive.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis "$(RUNS)/.compilation_cache"
	find adaptive benchmarks configs tests -name __pycache__ -type d -exec rm -rf {} +

# Made anew when the requirements change; the environment itself is kept, and an interrupted installation goes on.
$(READY): pyproject.toml constraints.txt
ifeq ($(UV),)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not a Python of version 3.11 or newer; name one, such as: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@[ -x "$(BIN)/python" ] || "$(PYTHON)" -m venv "$(VENV)"
	@echo "installing into $(VENV) ..."
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
else
	@[ -x "$(BIN)/python" ] || uv venv --quiet --python "$(if $(filter file,$(origin PYTHON)),>=3.11,$(PYTHON))" "$(VENV)"
	@echo "installing into $(VENV) with uv ..."
	@uv pip install --quiet --python "$(BIN)/python" -c constraints.txt -e '.[dev]'
endif
	@touch "$(READY)"
