# make run | test | ui | bench | results | clean. Without make (Windows): README, "Without make".
# TORCH: default (what the package index has) | cpu | cu126 (NVIDIA cards before Turing, such as a GTX 1060) | cu130 |
# rocm7.2 | xpu: a build that PyTorch offers at download.pytorch.org. The choice is kept in .venv until another is made.
VENV := .venv
BIN := $(VENV)/bin
# The first that runs (a shim may not), is one that torch is built for, and can make environments.
FITS := -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do $$p $(FITS) && echo $$p && break; done)
TORCH ?= $(or $(shell cat $(VENV)/.torch 2>/dev/null),default)
# Which torch is asked for: a stamp by its name is missing where another one is installed.
STAMP := $(VENV)/.installed-$(TORCH)
DEV_STAMP := $(VENV)/.installed-dev-$(TORCH)
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
# For what dvc starts. Called by their paths above and below: make 3.81, which macOS has, looks up commands without it.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: run test ui bench results clean
.DELETE_ON_ERROR:

run: $(STAMP)
	$(BIN)/dvc repro

test: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

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

$(STAMP): requirements.txt
	@test -x $(BIN)/python || $(PYTHON) $(FITS) || { echo "make: PYTHON=$(PYTHON) won't do: expected Python 3.11," \
		"3.12 or 3.13 with its venv module (Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.txt into $(VENV) (torch: $(TORCH)); a few minutes, some GB the first time"
	@# pip takes 2.14.1+cpu for 2.14.1: another build has to go before
	@if [ "$$(cat $(VENV)/.torch 2>/dev/null || echo default)" != "$(TORCH)" ]; then \
		$(BIN)/python -m pip uninstall -q -y torch torchvision; fi
	@rm -f $(VENV)/.installed-* $(VENV)/.torch
	@if [ "$(TORCH)" != default ]; then $(PIP) --extra-index-url https://download.pytorch.org/whl/$(TORCH) \
		$$(sed -nE 's/^(torch(vision)?==[^ ]+).*/\1+$(TORCH)/p' requirements.txt); fi
	@$(PIP) -r requirements.txt
	@echo $(TORCH) > $(VENV)/.torch
	@touch $@

$(DEV_STAMP): requirements-dev.txt $(STAMP)
	@$(PIP) -r requirements-dev.txt
	@touch $@
