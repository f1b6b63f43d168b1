# Everything sets itself up: a virtual environment in .venv, the wheel, a real p2pd.
# Needed on the machine: Rust (cargo), Python 3.10 or later, a C linker; no root.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Asked for when a recipe runs, by when it is there.
P2PD = $$($(BIN)/python tests/get_p2pd.py)

SOURCES := Cargo.toml Cargo.lock pyproject.toml build.rs \
	$(shell find src proto python -type f ! -name '*.so' ! -name '*.pyc')

.PHONY: demo examples test test-rust test-python test-p2pclient lint bench wheel fmt clean

demo: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/demo

# The programs that the documentation points to, run as it says.
examples: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py trio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/pubsub.py
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py trio

test: test-rust test-python

test-rust:
	cargo test --locked

test-python: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python -m pytest $(PYTEST_ARGS)

# PyPI p2pclient's own test suite, unmodified, with this package in its place.
test-p2pclient: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) PYTHON=$(CURDIR)/$(BIN)/python sh tests/p2pclient_suite/run.sh $(PYTEST_ARGS)

# Against the bindings it replaces, in one run.
bench: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python benches/run.py $(BENCH_ARGS)

lint: $(VENV)/.wheel
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy python/p2pclient_rs examples benches tests
	$(BIN)/python -m mypy.stubtest p2pclient_rs._native

wheel: $(VENV)/.wheel

fmt: $(VENV)/.tools
	cargo fmt
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist target

$(VENV)/.tools: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.wheel: $(VENV)/.tools $(SOURCES)
	rm -rf dist
	$(BIN)/maturin build --locked --release --quiet --interpreter $(BIN)/python --out dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	touch $@
