# Everything runs in .venv beside this file, which the first command makes.
.DEFAULT_GOAL := help

ifneq ($(lastword $(MAKEFILE_LIST)),Makefile)
# Read from another directory (make -f /there/Makefile): go there, so that all paths below are relative.
%:
	@$(MAKE) --no-print-directory -C "$(dir $(lastword $(MAKEFILE_LIST)))" $@
$(MAKEFILE_LIST): ;
else

PY := .venv/bin/python
# Two ranks, but one where there is exactly one GPU: ranks do not share a GPU.
RANKS ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')),1,2)
ARGS ?=

.PHONY: help demo bench test faults check lint format types architecture proto venv clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: .venv/installed ## Train on handwritten digits with two ranks while a policy grows the model
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m torch.distributed.run --standalone \
		--nproc_per_node=$(RANKS) -m tolaria.launch --config launch/configs/digits.toml $(ARGS)

bench: .venv/installed ## Measure how fast it is beside its budgets, in about an hour; ARGS=--quick in some minutes
	@$(PY) -m benchmarks $(ARGS)

test: .venv/installed ## Run the whole test suite; ARGS="tests/unit -k lr" runs a part
	@$(PY) -m pytest -q $(ARGS)

faults: .venv/installed ## Kill, stop, cut off and damage runs in every way of the fault matrix; prints it as a table
	@$(PY) -m pytest -q --faults $(ARGS)

check: .venv/installed ## Run all that CI runs: lint, types, architecture, test
	@for stage in lint types architecture test; do \
		echo "== $$stage"; start=$$(date +%s); \
		$(MAKE) --no-print-directory $$stage || exit 1; \
		echo "== $$stage: $$(( $$(date +%s) - start )) s"; \
	done

lint: .venv/installed ## Check style and likely bugs
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

format: .venv/installed ## Format the code and mend what can be mended without asking
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

types: .venv/installed ## Check types
	@$(PY) -m mypy

architecture: .venv/installed ## Check which part may import which
	@$(PY) -c "from importlinter.cli import lint_imports_command as main; main()" --no-logo

proto: .venv/installed ## Generate the message code from proto/
	@$(PY) proto/generate.py

venv: .venv/installed ## Make or refresh .venv

.venv/installed: pyproject.toml constraints.txt .ci/venv
	@.ci/venv

clean: ## Remove .venv, caches and build output; runs/ stays
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

endif
