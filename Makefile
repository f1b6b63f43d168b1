# Everything sets itself up: a virtual environment in .venv, the wheel, a real p2pd.
# Needed on the machine: Rust (cargo), Python 3.10 or later, a C linker; no root, but for
# Debian's torch, on which hivemind runs (hivemind-env), where it is not there yet.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where real hivemind runs: see tests/hivemind_swarm/env.sh.
HIVEMIND_VENV := .venv-hivemind
HIVEMIND_BIN := $(HIVEMIND_VENV)/bin
# Where the benches run: on the distribution's interpreter, which is an optimised one.
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
# Asked for when a recipe runs, by when it is there.
P2PD = $$($(BIN)/python tests/get_p2pd.py)

SOURCES := Cargo.toml Cargo.lock pyproject.toml \
	$(shell find src proto python -type f ! -name '*.so' ! -name '*.pyc')

.PHONY: demo examples test test-rust test-python test-daemons test-go test-js compatibility \
	test-p2pclient test-hivemind hivemind-env test-debug test-newest deny lint package platforms \
	bench bench-rust instructions soak wheel fmt clean

demo: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/demo

# The programs that the documentation points to, run as it says.
examples: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py trio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/pubsub.py
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py trio
	for example in daemon_test dht_test three_nodes echo unary; do \
		P2PD_PATH=$(P2PD) cargo run --locked --quiet --example $$example || exit 1; done

test: test-rust test-python

# Some of it has the Python client at the other side.
test-rust: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) P2PCLIENT_PYTHON=$(CURDIR)/$(BIN)/python cargo test --locked

test-python: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python -m pytest $(PYTEST_ARGS)

# What has to do with waiting, buffers and ends, with everything on that Python has to find defects. Loops
# in debug mode are too slow for a few.
test-debug: $(VENV)/.wheel
	PYTHONASYNCIODEBUG=1 PYTHONMALLOC=debug P2PD_PATH=$(P2PD) $(BIN)/python -X dev -W error -m pytest \
		tests/test_connector.py tests/test_streams.py tests/test_unary_handlers.py \
		-k "not tcp and not many_mebibytes and not 200_streams and not holds_back_its_callers"

# The same on upstream Go's daemon and on the JavaScript one. Needed besides: Go, node and npm.
# The two at once: they wait more than they work.
test-daemons: $(VENV)/.wheel
	$(MAKE) -j2 --output-sync=target test-go test-js

test-go: $(VENV)/.wheel
	$(BIN)/python -m pytest --daemon=go $(PYTEST_ARGS)

# jsp2pd can end whenever one of its clients closes a connection, which fails whichever test is next.
test-js: $(VENV)/.wheel
	$(BIN)/python -m pytest --daemon=js --reruns 2 $(PYTEST_ARGS)

# The Python tests on CPython 3.14 and 3.15 of Debian unstable. Not in CI: the first run installs Debian into the
# cache folder. Needs root and debootstrap. NEWEST_ARGS="3.15 -- -k fork" selects a version and tests.
test-newest:
	sh tests/newest/run.sh $(NEWEST_ARGS)

# docs/compatibility.md, from the table in tests/daemons/features.py.
compatibility:
	cd tests && $(PYTHON) -m daemons.features --write

# PyPI p2pclient's own test suite, unmodified, with this package in its place, on each kind of daemon.
# One after another: it listens on a port of its choice, and two at once take each other's connections.
test-p2pclient: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) PYTHON=$(CURDIR)/$(BIN)/python sh tests/p2pclient_suite/run.sh $(PYTEST_ARGS)
	P2PD_PATH=$$($(BIN)/python tests/get_daemon.py go) PYTHON=$(CURDIR)/$(BIN)/python \
		sh tests/p2pclient_suite/run.sh $(PYTEST_ARGS)
	JSP2PD_PATH=$$($(BIN)/python tests/get_daemon.py js) PYTHON=$(CURDIR)/$(BIN)/python \
		sh tests/p2pclient_suite/run.sh --daemon=js $(PYTEST_ARGS)

# Whole swarms of real hivemind, on its own bindings and with this package in their place.
test-hivemind: hivemind-env
	$(HIVEMIND_BIN)/python -m pytest tests/hivemind_swarm --swap=off $(PYTEST_ARGS)
	$(HIVEMIND_BIN)/python -m pytest tests/hivemind_swarm --swap=on $(PYTEST_ARGS)

hivemind-env: $(HIVEMIND_VENV)/.wheel

# Against the bindings it replaces, and a blocking client in Rust, in one run of some ten minutes: see
# docs/performance.md. BENCH_ARGS="--json docs/performance.json" renews the numbers in there.
bench: $(BENCH_VENV)/.wheel
	cargo build --locked --release --quiet --example mock_daemon --example floor
	P2PD_PATH=$(P2PD) $(BENCH_BIN)/python benches/run.py $(BENCH_ARGS)

# Load and endurance, for an hour or so: see docs/reliability.md.
soak: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python benches/soak/run.py $(SOAK_ARGS)

# Cost of the protocol crate alone, and of the Rust client with a mock daemon. `-- --test` runs each bench once.
bench-rust:
	cargo bench --locked $(BENCH_ARGS)

# How many instructions the hot paths take, compared with benches/instructions/counts.json, which
# INSTRUCTIONS_ARGS=--update records anew. Needed besides: valgrind.
instructions: $(VENV)/.wheel
	$(BIN)/python benches/instructions/run.py $(INSTRUCTIONS_ARGS)

# What is built in: its advisories, licences and sources, by deny.toml. Not in CI: it takes cargo-deny ten
# minutes to build, and the advisories come from GitHub.
deny:
	cargo install --locked --quiet cargo-deny@0.20.2
	cargo deny --locked check

# What crates.io would get, built from that alone.
package:
	cargo publish --workspace --dry-run --locked

# That the crate compiles where these checks do not run.
platforms:
	for target in x86_64-pc-windows-gnu aarch64-apple-darwin; do \
		rustup target add $$target && \
		cargo clippy --locked --target $$target -- -D warnings || exit 1; \
	done

lint: $(VENV)/.wheel
	cargo fmt --all --check
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --package p2pclient-rs-python -- -D warnings
	cargo clippy --locked --package p2pd-manager --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy python/p2pclient_rs examples benches tests
	$(BIN)/python -m mypy.stubtest p2pclient_rs._native

wheel: $(VENV)/.wheel

fmt: $(VENV)/.tools
	cargo fmt --all
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(HIVEMIND_VENV) $(BENCH_VENV) dist target

$(VENV)/.tools: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.wheel: $(VENV)/.tools $(SOURCES)
	rm -rf dist
	$(BIN)/maturin build --locked --release --quiet --interpreter $(BIN)/python --out dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	touch $@

$(HIVEMIND_VENV)/.tools: tests/hivemind_swarm/env.sh tests/hivemind_swarm/requirements.txt
	sh tests/hivemind_swarm/env.sh $(HIVEMIND_VENV)
	touch $@

# Without it the one at hand, and the report says so.
$(BENCH_VENV)/.tools: requirements-dev.txt benches/requirements.txt
	python=/usr/bin/python3; \
	$$python -c 'import ensurepip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null || python=$(PYTHON); \
	$$python -m venv --clear $(BENCH_VENV)
	$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check -r benches/requirements.txt
	touch $@

# The same wheel if that interpreter can use it, else one of its own.
$(HIVEMIND_VENV)/.wheel $(BENCH_VENV)/.wheel: %/.wheel: %/.tools $(VENV)/.wheel
	tag=$$($*/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])') && \
	{ ls dist/*-$$tag-*.whl >/dev/null 2>&1 || $(BIN)/maturin build --locked --release --quiet \
		--interpreter $*/bin/python --out dist; } && \
	$*/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall \
		--no-deps dist/*-$$tag-*.whl
	touch $@
