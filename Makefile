# Targets set up what they need: a virtual environment in .venv, the wheel, a real p2pd.
# Requirements: Rust (cargo), Python 3.10 or later, a C compiler. Only hivemind-env needs root, to
# install Debian's torch if it is missing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# For real hivemind: see tests/hivemind_swarm/env.sh.
HIVEMIND_VENV := .venv-hivemind
HIVEMIND_BIN := $(HIVEMIND_VENV)/bin
# For the benches, on the distribution's interpreter, since that is an optimised build.
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
# Evaluated when a recipe runs, after .venv was created.
P2PD = $$($(BIN)/python tests/get_p2pd.py)

SOURCES := Cargo.toml Cargo.lock pyproject.toml \
	$(shell find src proto python -type f ! -name '*.so' ! -name '*.pyc')

.PHONY: demo examples test test-rust test-python test-daemons test-go test-js compatibility \
	test-p2pclient test-hivemind hivemind-env test-debug test-newest deny lint package platforms \
	bench bench-rust instructions soak wheel fmt clean

demo: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/demo

# The programs that the documentation refers to, run as documented.
examples: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/echo.py trio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/dht.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/dht.py trio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/pubsub.py
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py asyncio
	P2PD_PATH=$(P2PD) $(BIN)/python examples/unary.py trio
	for example in daemon_test dht_test three_nodes echo unary; do \
		P2PD_PATH=$(P2PD) cargo run --locked --quiet --example $$example || exit 1; done

test: test-rust test-python

# Some tests need the Python client as a peer.
test-rust: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) P2PCLIENT_PYTHON=$(CURDIR)/$(BIN)/python cargo test --locked

test-python: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python -m pytest $(PYTEST_ARGS)

# Tests of waiting, buffers and shutdown, with Python's debugging aids switched on. The excluded tests
# are too slow in the debug mode of event loops.
test-debug: $(VENV)/.wheel
	PYTHONASYNCIODEBUG=1 PYTHONMALLOC=debug P2PD_PATH=$(P2PD) $(BIN)/python -X dev -W error -m pytest \
		tests/test_connector.py tests/test_streams.py tests/test_unary_handlers.py \
		-k "not tcp and not many_mebibytes and not 200_streams and not holds_back_its_callers"

# The Python tests on upstream Go's daemon and on the JavaScript one. Requires Go, node and npm.
# Both run at once, since they mostly wait.
test-daemons: $(VENV)/.wheel
	$(MAKE) -j2 --output-sync=target test-go test-js

test-go: $(VENV)/.wheel
	$(BIN)/python -m pytest --daemon=go $(PYTEST_ARGS)

# jsp2pd can end when a client closes a connection, which makes the next test fail.
test-js: $(VENV)/.wheel
	$(BIN)/python -m pytest --daemon=js --reruns 2 $(PYTEST_ARGS)

# The Python tests on CPython 3.14 and 3.15 of Debian unstable. Not in CI: the first run installs Debian into the
# cache folder. Needs root and debootstrap. NEWEST_ARGS="3.15 -- -k fork" selects a version and tests.
test-newest:
	sh tests/newest/run.sh $(NEWEST_ARGS)

# Generates docs/compatibility.md from tests/daemons/features.py.
compatibility:
	cd tests && $(PYTHON) -m daemons.features --write

# The test suite of PyPI's p2pclient, unmodified, with this package in its place, on each kind of
# daemon. One after another, since the suite listens on ports of its own choice.
test-p2pclient: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) PYTHON=$(CURDIR)/$(BIN)/python sh tests/p2pclient_suite/run.sh $(PYTEST_ARGS)
	P2PD_PATH=$$($(BIN)/python tests/get_daemon.py go) PYTHON=$(CURDIR)/$(BIN)/python \
		sh tests/p2pclient_suite/run.sh $(PYTEST_ARGS)
	JSP2PD_PATH=$$($(BIN)/python tests/get_daemon.py js) PYTHON=$(CURDIR)/$(BIN)/python \
		sh tests/p2pclient_suite/run.sh --daemon=js $(PYTEST_ARGS)

# Swarms of real hivemind, first with its own bindings, then with this package.
test-hivemind: hivemind-env
	$(HIVEMIND_BIN)/python -m pytest tests/hivemind_swarm --bindings=original $(PYTEST_ARGS)
	$(HIVEMIND_BIN)/python -m pytest tests/hivemind_swarm --bindings=ours $(PYTEST_ARGS)

hivemind-env: $(HIVEMIND_VENV)/.wheel

# Compares with the bindings that this package replaces, and with a blocking client in Rust. Takes about
# ten minutes: see docs/performance.md. BENCH_ARGS="--json docs/performance.json" renews its numbers.
bench: $(BENCH_VENV)/.wheel
	cargo build --locked --release --quiet \
		--package p2pd-test-support --bin mock_daemon --package p2pclient-rs --example floor
	P2PD_PATH=$(P2PD) $(BENCH_BIN)/python benches/run.py $(BENCH_ARGS)

# Load and endurance tests, for about an hour: see docs/reliability.md.
soak: $(VENV)/.wheel
	P2PD_PATH=$(P2PD) $(BIN)/python benches/soak/run.py $(SOAK_ARGS)

# Cost of the protocol crate alone, and of the Rust client with a mock daemon. `-- --test` runs each bench once.
bench-rust:
	cargo bench --locked $(BENCH_ARGS)

# Counts the instructions of the hot paths and compares them with benches/instructions/counts.json.
# INSTRUCTIONS_ARGS=--update records new counts. Requires valgrind.
instructions: $(VENV)/.wheel
	$(BIN)/python benches/instructions/run.py $(INSTRUCTIONS_ARGS)

# Checks advisories, licences and sources of all dependencies, by the rules in deny.toml. Not in CI:
# building cargo-deny takes ten minutes, and the advisories come from GitHub.
deny:
	cargo install --locked --quiet cargo-deny@0.20.2
	cargo deny --locked check

# Builds the crates as they would be published.
package:
	cargo publish --workspace --dry-run --locked

# Compiles the crates for platforms on which the tests do not run. Without the node, which needs a C compiler
# for each of them.
platforms:
	for target in x86_64-pc-windows-gnu aarch64-apple-darwin; do \
		rustup target add $$target && \
		cargo clippy --locked --workspace --exclude p2pd-node --exclude p2pclient-rs-python \
			--target $$target -- -D warnings || exit 1; \
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
	PATH=$(CURDIR)/$(BIN):$$PATH pyright tests/typing_sample.py
	PATH=$(CURDIR)/$(BIN):$$PATH pyright --verifytypes p2pclient_rs --ignoreexternal

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

# Falls back to another interpreter, which the report then says.
$(BENCH_VENV)/.tools: requirements-dev.txt benches/requirements.txt
	python=/usr/bin/python3; \
	$$python -c 'import ensurepip, sys; assert sys.version_info >= (3, 10)' 2>/dev/null || python=$(PYTHON); \
	$$python -m venv --clear $(BENCH_VENV)
	$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check -r benches/requirements.txt
	touch $@

# Uses the wheel of .venv if the interpreter version matches, or else builds another one.
$(HIVEMIND_VENV)/.wheel $(BENCH_VENV)/.wheel: %/.wheel: %/.tools $(VENV)/.wheel
	tag=$$($*/bin/python -c 'import sys; print("cp%d%d" % sys.version_info[:2])') && \
	{ ls dist/*-$$tag-*.whl >/dev/null 2>&1 || $(BIN)/maturin build --locked --release --quiet \
		--interpreter $*/bin/python --out dist; } && \
	$*/bin/python -m pip install --quiet --disable-pip-version-check --force-reinstall \
		--no-deps dist/*-$$tag-*.whl
	touch $@
