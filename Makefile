# Every target installs what it needs into .venv by itself, once. `make help` explains them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PRESET ?= small
CELEBA ?= celeb_a
DATA ?=
PART ?= all
KILLS ?= 50
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo train-celeba sample evaluate features runs mnist compare deltas bias manifold pca ica bench bench-gpu profile \
  bench-ica chaos test test-fast lint format package clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\n  Variables: CELEBA=path  DATA=path  PRESET=demo|small|published  RUN_DIR=runs/...  ARGS="--flag value"  PYTHON=python3\n'

demo: $(VENV)/.train ## Train a deterministic generator on synthetic faces, with pictures, in about 4 minutes on 2 cores
	$(RUN) -m experiments.celeba --preset demo $(ARGS)

train-celeba: $(VENV)/.data ## Train on CelebA: CELEBA=folder or zip, PRESET=small|published, ARGS="--flag value"
	$(RUN) -m experiments.celeba --preset $(PRESET) --data "$(CELEBA)" $(ARGS)

sample: $(VENV)/.train ## Draw samples from a finished run: RUN_DIR=runs/celeba/demo-0
	@test -n "$(RUN_DIR)" || { echo 'Name the run: make sample RUN_DIR=runs/celeba/demo-0'; exit 2; }
	$(RUN) -m spread_jax.cli sample "$(RUN_DIR)" $(ARGS)

evaluate: $(VENV)/.train ## Distances, bounds and a report of a finished run: RUN_DIR=runs/celeba/demo-0
	@test -n "$(RUN_DIR)" || { echo 'Name the run: make evaluate RUN_DIR=runs/celeba/demo-0'; exit 2; }
	$(RUN) -m spread_jax.cli evaluate "$(RUN_DIR)" $(ARGS)

features: $(VENV)/.train ## Train the features that distances are taken in: ARGS="--data path"
	$(RUN) -m spread_jax.cli features $(ARGS)

runs: $(VENV)/.train ## List the runs below runs/ with their key numbers
	@$(RUN) -m spread_jax.cli runs $(ARGS)

mnist: $(VENV)/.data ## Fixed and learned noise on digits: DATA=folder of MNIST's idx files, or scikit-learn's digits without it
	$(RUN) -m experiments.mnist $(if $(DATA),--preset $(PRESET) --data "$(DATA)",--preset demo) $(ARGS)

compare: $(VENV)/.data ## VAE, spread noises, WAE, spread GAN over seeds, one table: PRESET=faces|mnist|digits|celeba DATA=path
	$(RUN) -m experiments.compare --preset $(if $(filter small,$(PRESET)),faces,$(PRESET)) \
	  $(if $(DATA),--data "$(DATA)") $(ARGS)

deltas: $(VENV)/.train ## Two point masses: every divergence exactly and estimated, finite where KL is not; a figure in seconds
	$(RUN) -m experiments.deltas $(ARGS)

bias: $(VENV)/.train ## Noise on one side biases an estimate, noise on both does not: figure and table, about a minute
	$(RUN) -m experiments.bias $(ARGS)

manifold: $(VENV)/.train ## A generator of two latents recovers a curved sheet in space; a figure in half a minute
	$(RUN) -m experiments.manifold $(ARGS)

pca: $(VENV)/.train ## EM stalls at small noise; spreading allows a large one without bias: exact rates, a figure in half a minute
	$(RUN) -m experiments.pca $(ARGS)

ica: $(VENV)/.data ## ICA without noise: EM stalls, three methods do not: PRESET=small|overcomplete|images|audio|published
	$(RUN) -m experiments.ica --preset $(PRESET) $(ARGS)

bench: $(VENV)/.dev ## Speed and memory against peers: PART=all|step|density|mmd|elbo|loader|devices|start
	$(RUN) -m benchmarks --part $(PART) $(ARGS)

bench-gpu: $(VENV)/.dev ## An accelerator in one call: precisions, batches, gradients, against the peak; under 8 minutes
	$(RUN) -m benchmarks.gpu $(ARGS)

profile: $(VENV)/.dev ## A trace of the train step and its ten costliest operations
	$(RUN) -m benchmarks.profile $(ARGS)

bench-ica: $(VENV)/.dev ## ICA against FastICA, Picard and JADE: errors and times; about 5 minutes, ARGS=--full about half an hour
	$(RUN) -m benchmarks.ica $(ARGS)

chaos: $(VENV)/.dev ## Kill, damage and starve KILLS=50 training runs, fuzz the readers; writes docs/benchmarks/faults.md
	SPREAD_JAX_CHAOS=docs/benchmarks SPREAD_JAX_KILLS=$(KILLS) $(RUN) -m pytest tests/faults \
	  tests/cli/test_processes.py::test_one_of_two_processes_is_killed $(ARGS)

test: $(VENV)/.dev ## Run every test, warnings as errors
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

test-fast: $(VENV)/.dev ## Run the tests that take less than about half a second each: about a minute on 2 cores
	$(RUN) -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

lint: $(VENV)/.dev ## Check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.dev ## Fix style and formatting
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

.PHONY: docs
docs: $(VENV)/.docs ## Build the documentation into site/, running its tutorials; open site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

package: $(VENV)/.dev ## Build the wheel and the source archive into dist/
	$(RUN) -m pip install -q build
	$(RUN) -m build

clean: ## Remove the environment and build products; runs/ stays
	rm -rf $(VENV) dist build site .pytest_cache .ruff_cache .hypothesis

# One stamp for each set of extras; a changed pyproject.toml installs again.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'spread_jax needs Python 3.11 or newer, and "$(PYTHON)" is not that. Name one: make PYTHON=python3.12 ...'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.train: pyproject.toml | $(VENV)/.python
	$(RUN) -m pip install -q -e '.[train]'
	@touch $@

$(VENV)/.data: pyproject.toml | $(VENV)/.train
	$(RUN) -m pip install -q -e '.[train,data]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.train
	$(RUN) -m pip install -q -e '.[docs]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.python
	$(RUN) -m pip install -q -e '.[dev]'
	@touch $@ $(VENV)/.train $(VENV)/.data $(VENV)/.docs
