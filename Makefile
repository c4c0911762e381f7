# `make run` and `make test` do everything, from a clean clone on; the rest is for those who change the code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := .installed
PEERS := .peers-installed

.DEFAULT_GOAL := help
.PHONY: help run test check bench proof migration lint types wheel matrix oldest clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/$(READY) ## a day of two tills on a real buffer: receipts, kills, an outage, delivery, the status
	@$(BIN)/python -m kkt_buffer demo

test: $(VENV)/$(READY) ## all tests, with coverage
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term

check: lint types test wheel matrix ## everything that CI runs
	@echo "make check: all good"

proof: $(VENV)/$(READY) ## the same tests, deeper: random histories, 50,000 power losses, failover by Patroni
	KKT_BUFFER_PROOF=1 $(BIN)/python -m pytest -s tests/stress tests/crash tests/postgresql tests/moving

bench: $(VENV)/$(PEERS) ## speed, side by side with the driver alone and other queues; make bench o="--quick"
	$(BIN)/python tests/bench/bench.py $(o)

migration: $(VENV)/$(READY) ## make migration m="What it does": write the next migration
	@sh .ci/migration.sh $(BIN) "$(m)"

lint: $(VENV)/$(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/$(READY)
	$(BIN)/mypy
	$(BIN)/python .ci/users_types.py

wheel: $(VENV)/$(READY) ## build the wheel, install it into an empty environment and use it there
	sh .ci/wheel.sh $(BIN)/python

# Two runs at a time, without the slow tests and without those marked one_python: some ten minutes on two cores. The
# Python of `make test` is not repeated; pysqlite3 and the oldest SQLAlchemy run on it.
matrix: $(VENV)/$(READY) ## the tests on every supported Python, with pysqlite3, and on the oldest SQLAlchemy
	$(BIN)/python .ci/matrix.py

oldest: $(VENV)/$(READY) ## of these, the tests on the oldest SQLAlchemy alone
	$(BIN)/python .ci/matrix.py oldest

clean: ## remove what the other targets made
	rm -rf .venv .venv-3.1? .venv-oldest .venv-sqlite dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/$(READY): pyproject.toml .ci/constraints.txt .ci/venv.sh
	sh .ci/venv.sh $(PYTHON) $(VENV) .ci/constraints.txt dev

# The peers of the benchmark, which nothing else needs.
$(VENV)/$(PEERS): $(VENV)/$(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[bench]'
	touch $@
