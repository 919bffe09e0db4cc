# `make quickstart` runs the main job, `make test` the tests. Every target first runs `setup`, which is quick when done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
QUICKSTART ?= runs/quickstart

.PHONY: help setup quickstart reproduce results test lint format bench lock tiny-world generate golden clean cluster-build cluster-up cluster-down e2e

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## Install everything into .venv (idempotent)
	@tools/setup.sh

quickstart: setup ## The main job: teachers in Triton -> DeepSpeed distillation -> table -> image API
	@.venv/bin/opd run examples/tiny/quickstart.yaml --work $(QUICKSTART)

reproduce: setup ## The full-length run with three seeds, and the table in docs/
	@$(PY) tools/reproduce.py

results: setup ## The comparisons of docs/results.md: six hours on 2 cores, and the same command goes on
	@$(PY) tools/results.py $(NAMES)

test: setup ## All tests but those of `make e2e`; they need a control plane and helm, built once in 11 minutes
	@for part in control-plane crdcheck helm prometheus browser; do tools/devcluster/build.sh $$part >/dev/null || exit 1; done
	@$(PY) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: setup ## ruff, mypy --strict, import-linter, hadolint
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports
	@cd examples/tiny && ../../.venv/bin/mypy
	@MYPYPATH=tools .venv/bin/mypy -p devcluster -p monitoring -m helm_chart
	@.venv/bin/hadolint images/*.Containerfile

format: setup ## Format and fix what ruff can fix
	@.venv/bin/ruff format . && .venv/bin/ruff check --fix .

bench: setup ## Benchmarks, each with a ratio measured side by side
	@for file in benchmarks/*.py; do echo "== $$file"; PYTHONPATH=tools $(PY) $$file || exit 1; done

generate: setup ## Files that are generated: the CRD, references, dashboards, the table of the chart's values
	@$(PY) -m opd_core.api.crd && $(PY) -m opd_core.api.reference
	@export PYTHONPATH=tools; $(PY) -m monitoring.reference && $(PY) -m monitoring.dashboards && $(PY) -m helm_chart readme && $(PY) -m figures && $(PY) tools/results.py --page

golden: setup ## What the chart renders, for tests/chart; read the difference before you commit it
	@PYTHONPATH=tools $(PY) -m helm_chart golden

tiny-world: setup ## Train the tiny world again (an hour at most on 2 cores); STAGES="klein/base klein/teachers" for some
	@$(PY) -m opd_tiny.build --out examples/tiny $(if $(STAGES),--stage $(STAGES))

cluster-build: setup ## Build the development cluster's programs (14 minutes the first time)
	@tools/devcluster/build.sh node

cluster-up: setup ## A one-node Kubernetes with the project's images (root; 8 s and 4 s when warm)
	@PYTHONPATH=tools $(PY) -m devcluster up && PYTHONPATH=tools $(PY) -m devcluster images --extra examples/tiny

cluster-down: ## Stop it and remove everything of it but its images
	@PYTHONPATH=tools $(PY) -m devcluster down

e2e: setup ## Tests on a real one-node Kubernetes in which pods run (root)
	@tools/devcluster/build.sh node >/dev/null && tools/devcluster/build.sh helm >/dev/null
	@$(PY) -m pytest -q -o timeout=1800 tests/e2e

lock: setup ## Compile requirements/*.txt, pinned with hashes, from pyproject.toml
	@tools/lock.sh

clean: ## Remove the environment and all runs
	@rm -rf .venv runs
