# `make` alone says what there is. On Windows: README, "Run it".
# TORCH names a build that PyTorch offers at download.pytorch.org. The choice is kept in .venv until another is made.
VENV := .venv
BIN := $(VENV)/bin
# The first Python that runs (a shim may not), that torch is built for, and that can make environments.
FITS := -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do $$p $(FITS) && echo $$p && break; done)
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),default)
# A stamp named after the build is missing if another build is installed.
STAMP := $(VENV)/.installed-$(TORCH)
DEV_STAMP := $(VENV)/.installed-dev-$(TORCH)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# For what dvc starts. Commands are called by their paths, because make 3.81, which macOS has, looks them up without this.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help run ui test bench results clean
.DELETE_ON_ERROR:

help:
	@echo "make run      install everything into .venv, then train, evaluate, score and compare (dvc repro)"
	@echo "make ui       open the report of all machines, and MLflow with every run"
	@echo "make test     lint, check types and imports, run the tests: offline, on the CPU"
	@echo "make bench    run the benchmarks; each is a ratio measured side by side"
	@echo "make results  check the published results, and compare their machines"
	@echo "make clean    delete .venv; data, runs and reports stay"
	@echo ""
	@echo "Another build of torch: make run TORCH=cpu | cu126 (NVIDIA cards before Turing, such as a GTX 1060) | cu130 |"
	@echo "rocm7.2 | xpu. Another Python: make run PYTHON=python3.12. All commands: $(BIN)/python -m pipeline"

run: $(STAMP)
	$(BIN)/dvc repro

test: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist loadfile

ui: $(STAMP)
	$(BIN)/python -m pipeline.ui

bench: $(STAMP)
	$(BIN)/python -m benchmarks.blog_baseline
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.overheads

results: $(STAMP)
	$(BIN)/python -m results.check
	$(BIN)/python -m results.compare

clean:
	rm -rf $(VENV)

# requirements.lock is made from requirements.txt: docs/development.md. Its hashes are those of torch's default build; for
# another build, torch and what only the default build needs are left out.
WITHOUT_TORCH := awk '/^[a-z]/ {torch = /^(torch|torchvision|triton)==/ || (/^(cuda|nvidia)-/ && !/^nvidia-ml-py=/)} !torch'

$(STAMP): requirements.txt requirements.lock
	@test -x $(BIN)/python || $(PYTHON) $(FITS) || { echo "make: PYTHON=$(PYTHON) won't do: expected Python 3.11," \
		"3.12 or 3.13 with its venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.lock into $(VENV) (torch: $(TORCH)); a few minutes, some GB the first time"
	@# pip takes 2.14.1+cpu for 2.14.1: another build has to go before
	@if [ "$$(cat $(VENV)/.torch 2>/dev/null || echo default)" != "$(TORCH)" ]; then \
		$(BIN)/python -m pip uninstall -q -y torch torchvision; fi
	@rm -f $(VENV)/.installed-* $(VENV)/.torch
	@if [ "$(TORCH)" != default ]; then $(PIP) --extra-index-url https://download.pytorch.org/whl/$(TORCH) \
		$$(sed -nE 's/^(torch(vision)?==[^ ]+).*/\1+$(TORCH)/p' requirements.txt); fi
	@$(if $(filter default,$(TORCH)),cat,$(WITHOUT_TORCH)) requirements.lock > $(VENV)/requirements.lock
	@$(PIP) --require-hashes -r $(VENV)/requirements.lock
	@echo $(TORCH) > $(VENV)/.torch
	@touch $@

$(DEV_STAMP): requirements-dev.txt $(STAMP)
	@$(PIP) -r requirements-dev.txt
	@touch $@
