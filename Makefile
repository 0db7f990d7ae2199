# Three commands matter: `make smoke` trains both small recipes end to end, `make test` runs the suite, `make cluster`
# the part of it that needs a real Slurm and a real Ray.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi),,cpu)
SMOKE := runs/smoke
HALF_THE_CORES := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n > 1 ? n / 2 : 1)))
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec

.PHONY: install check test cluster quality smoke smoke-dit smoke-moe parity bench clean

install: $(STAMP)

# torch comes first and alone: deepspeed is a source distribution whose build imports it.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/pip install -qq --disable-pip-version-check "torch>=2.11,<2.14" numpy setuptools wheel
	@$(BIN)/pip install -qq --disable-pip-version-check --no-build-isolation "deepspeed>=0.18"
	@$(BIN)/pip install -qq --disable-pip-version-check --editable ".[all]"
	@touch $@

$(VENV)/.installed-dev: $(STAMP)
	@$(BIN)/pip install -qq --disable-pip-version-check --editable ".[dev]"
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three at a time on two cores: much of the suite waits for ranks, servers and disks.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=20 -m "not cluster and not quality"

# Two at a time: most of a cluster test is waiting.
cluster: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20 tests/cluster

# Recipes and pipelines trained as they are, against the gates of recipes/README.md: half an hour.
quality: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -s --durations=20 -m quality tests/smoke

parity: $(VENV)/.installed-dev
	SIXFOLD_PARITY=full $(BIN)/python -m pytest -q -s tests/parity/test_recipes.py tests/parity/test_distillation_parity.py tests/distributed/test_recipe_resume.py \
		tests/distributed/test_planning_ranks.py

bench: $(VENV)/.installed-dev data/stdlib
	$(BIN)/python tests/benchmarks/bench_models.py
	$(BIN)/python tests/benchmarks/bench_stream.py
	$(BIN)/python tests/benchmarks/bench_checkpoint.py

data/digits: | $(STAMP)
	@$(BIN)/sixfold data demo digits --out $@

data/stdlib: | $(STAMP)
	@$(BIN)/sixfold data demo stdlib --out $@

# Both recipes train side by side on half of the cores each: small operations gain little from more.
smoke: $(STAMP) data/digits data/stdlib
	@rm -rf $(SMOKE)
	@$(MAKE) --no-print-directory -j2 smoke-dit smoke-moe
	@$(BIN)/sixfold sample $(SMOKE)/dit --n 40 --out $(SMOKE)/pictures
	@$(BIN)/sixfold sample $(SMOKE)/moe --n 4 --out $(SMOKE)/texts
	@echo "labelled sample grid: $(SMOKE)/pictures/grid.png"
	@echo "both runs in MLflow: $(BIN)/sixfold ui"

smoke-dit: RECIPE = flow/dit-smoke
smoke-moe: RECIPE = lm/moe-smoke
smoke-dit smoke-moe: smoke-%:
	@OMP_NUM_THREADS=$(HALF_THE_CORES) $(BIN)/sixfold run $(RECIPE) --run-dir $(SMOKE)/$* 2>&1 | sed -u 's|^|$*: |'

clean:
	rm -rf $(SMOKE) data/digits data/stdlib .mypy_cache .ruff_cache .pytest_cache
