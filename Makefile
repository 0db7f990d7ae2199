# Two commands matter: `make smoke` trains both small recipes end to end, `make test` runs the whole suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export DS_ACCELERATOR ?= $(if $(shell command -v nvidia-smi),,cpu)
SMOKE := runs/smoke

.PHONY: install check test smoke parity bench clean

install: $(STAMP)

# torch comes first and alone: deepspeed is a source distribution whose build imports it.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check "torch>=2.11,<2.14" numpy setuptools wheel
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation "deepspeed>=0.18"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[all]"
	@touch $@

$(VENV)/.installed-dev: $(STAMP)
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

parity: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -s tests/parity/test_recipes.py

bench: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/bench_models.py
	$(BIN)/python tests/benchmarks/bench_stream.py

data/digits: | $(STAMP)
	$(BIN)/sixfold data demo digits --out $@

data/stdlib: | $(STAMP)
	$(BIN)/sixfold data demo stdlib --out $@

smoke: $(STAMP) data/digits data/stdlib
	rm -rf $(SMOKE)
	$(BIN)/sixfold run flow/dit-smoke --run-dir $(SMOKE)/dit
	$(BIN)/sixfold run lm/moe-smoke --run-dir $(SMOKE)/moe
	$(BIN)/sixfold sample $(SMOKE)/dit --n 40 --out $(SMOKE)/dit-samples
	$(BIN)/sixfold sample $(SMOKE)/moe --n 1 --out $(SMOKE)/moe-samples
	@echo "pictures: $(SMOKE)/dit-samples/grid.png"
	@echo "both runs: mlflow.db; open them with '$(BIN)/sixfold ui'"

clean:
	rm -rf $(SMOKE) data .mypy_cache .ruff_cache .pytest_cache
