# Everything goes into .venv; PYTHON names the interpreter to make it with.
PYTHON ?= python3
BIN := .venv/bin
CARGO := cd datapath && cargo
BUILD := .venv/built
SOURCES := pyproject.toml src/afbus/__init__.py $(wildcard datapath/Cargo.* datapath/build.rs) \
	$(shell find datapath/src -name '*.rs')
# One interpreter for pip and for cargo, or each would rebuild what the other built.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build run bench test test-rust test-python lint types fmt clean

help:  ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@for tool in $(PYTHON) cargo cc; do command -v $$tool >/dev/null || \
		{ echo "missing: $$tool (needed: Python 3.11 or later, Rust 1.88 or later, a C compiler)"; exit 1; }; done
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "missing: Python 3.11 or later"; exit 1; }
	$(PYTHON) -m venv .venv

venv: .venv/ready  ## create .venv with the build tools
.venv/ready: $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check 'setuptools>=77' 'setuptools-rust>=1.12' wheel
	@touch $@

build: $(BUILD)  ## install afbus (editable, release mode) and the tools of the developer
$(BUILD): .venv/ready $(SOURCES)
	@command -v cargo >/dev/null || { echo "missing: cargo (Rust 1.88 or later)"; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

test: lint types test-rust test-python  ## all checks and all tests
	@$(BIN)/python tests/spec_numbers.py

test-rust: build  ## the tests of the Rust crate, and the ring's memory order under loom
	@# the test programs link libpython, which may be where the loader does not look
	export LD_LIBRARY_PATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))') && \
	$(CARGO) test --locked
	$(CARGO) test --locked --lib --target-dir target/loom --config 'build.rustflags=["--cfg=loom"]'

test-python: build  ## the tests of the Python packages
	$(BIN)/pytest -q

lint: build  ## style and likely mistakes, Rust and Python
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: build  ## mypy --strict
	$(BIN)/mypy

run: build  ## show a bus at work: the mail step by step, this machine's counters, a cluster of three hosts
	@env -u AFBUS_NODE $(BIN)/python examples/mail.py
	@env -u AFBUS_NODE $(BIN)/python examples/counters.py
	@env -u AFBUS_NODE $(BIN)/python examples/cluster.py

# What pip cannot install is named by the bench and left out.
bench: .venv/peers  ## measure afbus beside what else carries messages, in turns (7 minutes)
	env -u AFBUS_NODE $(BIN)/python -m bench

.venv/peers: $(BUILD)
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' | \
	while read -r peer; do $(BIN)/pip install -q --disable-pip-version-check "$$peer" || echo "not installed: $$peer"; done
	@touch $@

fmt: build  ## format Rust and Python
	$(CARGO) fmt
	$(BIN)/ruff check -q --select I --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built
	rm -rf .venv build dist datapath/target .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -rf src/*.egg-info src/afbus/_datapath*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
