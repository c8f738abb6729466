# `make` lists the targets. All that is needed is Python 3.11 or newer.

VENV ?= .venv
ARGS ?=
# One more than cores, because many tests wait; WORKERS=0 runs all in one process, where a debugger works.
WORKERS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v $$python; break; fi; done)

# Tests start a few hundred processes; without compiled modules each of them takes a second more.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo run test test-long test-clients test-install test-browser screenshots lint format types check bench bench-parts bench-gate bench-ledger bench-soak bench-page bench-schedule docs prices fetch-prices check-prices lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## make the virtual environment, from the lock file

$(STAMP): requirements-dev.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and none was found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## simulator, daemon and a request in each dialect on free ports (ARGS=--once ends after them)
	@$(BIN)/codex-proxy demo $(ARGS)

run: $(STAMP) ## run the daemon (ARGS="-config config.yaml")
	@$(BIN)/codex-proxy $(ARGS)

test: $(STAMP) ## the tests, without the long ones and those that need other programs
	$(BIN)/pytest -n $(WORKERS) -m "not long and not clients and not browser" $(ARGS)

test-long: $(STAMP) ## the full counts: kills, soaks, every split
	$(BIN)/pytest --timeout 3600 -o faulthandler_timeout=3600 -m long $(ARGS)

test-clients: $(STAMP) ## real clients; needs npm
	$(BIN)/pytest --timeout 600 -o faulthandler_timeout=600 -m clients $(ARGS)

test-install: $(STAMP) ## the wheel in a clean environment; needs a package registry
	$(BIN)/pytest --timeout 600 -o faulthandler_timeout=600 -m clients $(ARGS) tests/test_packaging.py

test-browser: $(STAMP) ## the page in a real browser; needs chromium, and npm for axe-core
	$(BIN)/pytest -n 2 -m browser $(ARGS)

screenshots: $(STAMP) ## the pictures in docs/images; needs chromium
	$(BIN)/python -m tests.browser.screenshots $(ARGS)

lint: $(STAMP) ## find mistakes
	$(BIN)/ruff check .

format: $(STAMP) ## format, and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP) ## check the types
	$(BIN)/mypy

check: $(STAMP) ## format, lint and types, changing nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP) ## what a request costs, beside nginx and a proxy in Go (ARGS=--quick for a minute)
	$(BIN)/python -m bench.perf $(ARGS)

bench-parts: $(STAMP) ## numbers of the hot paths by themselves
	$(BIN)/python bench/run.py

bench-gate: $(STAMP) ## what limits and money add to a request, in CPU
	$(BIN)/python -m bench.gate $(ARGS)

bench-ledger: $(STAMP) ## how many turns a ledger writes down (ARGS="--database-url postgresql://.../..." for a server)
	$(BIN)/python -m bench.ledger $(ARGS)

bench-soak: $(STAMP) ## an hour of mixed load at half of what the daemon can do (ARGS="--minutes 5")
	$(BIN)/python -m bench.soak $(ARGS)

bench-page: $(STAMP) ## what an open page costs the daemon, in pairs (ARGS="--topic now")
	$(BIN)/python -m bench.page $(ARGS)

bench-schedule: $(STAMP) ## what each strategy serves of what could be served (ARGS=--quick for a minute)
	$(BIN)/python -m bench.schedule $(ARGS)

docs: $(STAMP) ## renew the generated tables
	$(BIN)/python -m codex_proxy.config docs/configuration.md
	$(BIN)/python -m tests.cases.render docs/translation.md

prices: $(STAMP) ## renew the table of prices from its two sources; needs a package registry
	rm -rf build/prices
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --dest build/prices litellm
	$(BIN)/python tools/update_prices.py --litellm build/prices/litellm-*.whl $(ARGS)

fetch-prices: $(STAMP) ## get the source of the prices that is not installed, 41 MB; needs a package registry
	$(BIN)/python tools/update_prices.py --fetch

check-prices: fetch-prices ## compare the table of prices with the two sources that it was made of
	$(BIN)/python tools/update_prices.py --check

lock: $(STAMP) ## renew the lock files (ARGS=--upgrade for newer versions)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml $(LOCK) -o requirements.lock $(ARGS)
	$(BIN)/uv pip compile pyproject.toml --group dev $(LOCK) -o requirements-dev.lock $(ARGS)

LOCK := --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url

clean: ## remove what was made, but no account and no data
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
