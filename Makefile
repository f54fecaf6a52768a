# Each target works by itself from a clean clone; it needs Python 3.11 to 3.13, a C++17 compiler and make.
#   make demo     train and serve a small GPT
#   make test     the default test suite, on the installed package
#   make test-full  all of it, with the tests marked slow
#   make fuzz     100,000 random calls, good and hostile (FUZZ_CALLS, FUZZ_SEED, FUZZ_WORKERS)
#   make bench    time flash8 on this machine
#   make gpu-pack   compile every kernel that gpu-check runs, into build/gpu-pack; needs no GPU
#   make gpu-check  on a Hopper GPU, with that pack: kernels, hardware facts, benchmarks, GPU tests
#   make sanitize  the tests of the native layer, with AddressSanitizer and UBSan in the extension
#   make lint     ruff, mypy, clang-format
#   make format   rewrite what lint can mend by itself
#   make lock     write requirements/: the hashes of what constraints.txt and compiler.txt pin
#   make clean    remove the environment and everything built
# PYTHON names the interpreter for the environment; PYTEST_ARGS is handed to pytest, GPU_PACK_ARGS and
# GPU_CHECK_ARGS to the scripts of those targets.

SHELL := /bin/bash
.DELETE_ON_ERROR:
unexport PYTHONPATH

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$python && break; done)

# Stamps are named by the content they stand for, so an edit, a new file and a deleted file all count.
digest = $(shell find $(1) -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0 \
	| LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
BASE := $(VENV)/.base-$(call digest,constraints.txt requirements/base.txt)
TOOLS := $(VENV)/.tools-$(call digest,constraints.txt requirements/all.txt)
COMPILER := $(VENV)/.compiler-$(call digest,requirements/compiler.txt)
SIMULATOR := $(VENV)/.simulator-$(call digest,$(addprefix tests/simulator/,pyproject.toml CMakeLists.txt README.md flash8_sim runtime src))
PACKAGE := $(VENV)/.package-$(call digest,pyproject.toml CMakeLists.txt README.md LICENSE hopper cutlass_kernels python)

CXX_SOURCES := $(shell find hopper cutlass_kernels python/native tests bench -type f \
	\( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) 2>/dev/null)

.PHONY: demo test test-full bench gpu-pack gpu-check lint format clean install fuzz sanitize lock

# With an NVIDIA GPU the demo trains through kernels, which have to be compiled.
demo: $(PACKAGE) $(if $(wildcard /dev/nvidia[0-9]*),$(COMPILER))
	$(BIN)/python examples/byte_gpt/demo.py

# One torch thread per worker: the tensors of the tests are too small for more to pay.
test: $(TOOLS) $(PACKAGE) $(SIMULATOR) $(COMPILER)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-full: $(TOOLS) $(PACKAGE) $(SIMULATOR) $(COMPILER)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist worksteal -m "slow or not slow" $(PYTEST_ARGS)

FUZZ_CALLS ?= 100000
FUZZ_SEED ?= 0
FUZZ_WORKERS ?= 2
fuzz: $(TOOLS) $(PACKAGE) $(SIMULATOR) $(COMPILER)
	OMP_NUM_THREADS=1 $(BIN)/python tests/support/run_fuzz.py \
		--calls $(FUZZ_CALLS) --seed $(FUZZ_SEED) --workers $(FUZZ_WORKERS)

# tests/support: bench_launch.py times calls of the driver that the tests bring.
bench: $(PACKAGE)
	@set -e; for script in bench/bench_*.py; do echo "== $$script"; \
		PYTHONPATH=tests/support $(BIN)/python $$script; done

gpu-pack: $(TOOLS) $(PACKAGE) $(COMPILER)
	$(BIN)/python bench/gpu_pack.py $(GPU_PACK_ARGS)

# For a machine with a GPU and perhaps no network: the system's Python, which has torch, and the pack.
gpu-check:
	$(PYTHON) bench/gpu_check.py $(GPU_CHECK_ARGS)

# The extension and the fake driver with sanitizers, in a copy of the package beside the installed one. Python and
# torch are as they are, so the runtimes are preloaded. PYTHONMALLOC: objects of Python end where malloc says.
# Leaks are not looked for: Python and torch keep what they have until the process ends, and
# test_calls_leak_nothing, which a quarantine of freed memory would fail, counts ours. FLASH8_NVCC: no compiler is
# run in here, and so no simulated device; what it runs has other bounds than these.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -g
runtime = $(shell $(CXX) -print-file-name=$(1))
NATIVE_TESTS := $(filter-out %/test_driver_api.py,$(wildcard tests/native/test_*.py)) \
	tests/backends/hopper/test_launch_capture.py tests/backends/hopper/test_trust_troubles.py \
	$(wildcard tests/ops/test_plan_cache*.py tests/ops/test_decode_plans*.py) tests/ops/test_backward_plans.py \
	tests/ops/test_gemm_plans.py \
	tests/api/test_expanded.py tests/api/test_threads.py

sanitize: $(TOOLS) $(SIMULATOR)
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B $(SANITIZED) -G Ninja -DFLASH8_SANITIZE=ON \
		-DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(SANITIZED) --target _native
	rm -rf $(SANITIZED)/site && mkdir -p $(SANITIZED)/site
	cp -r python/flash8 $(SANITIZED)/site/ && cp $(SANITIZED)/_native*.so $(SANITIZED)/site/flash8/
	cp -r hopper cutlass_kernels $(SANITIZED)/site/flash8/
	env PYTHONPATH=$(abspath $(SANITIZED)/site) PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
		FLASH8_TEST_CXXFLAGS="$(SANITIZERS)" FLASH8_NVCC=none \
		ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libubsan.so) $(call runtime,libstdc++.so)" \
		$(BIN)/python -P -m pytest -q $(NATIVE_TESTS) -k "not calls_leak" $(PYTEST_ARGS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build out .mypy_cache .pytest_cache .ruff_cache

install: $(PACKAGE)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "flash8 needs Python 3.11, 3.12 or 3.13; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Everything is installed at the version of constraints.txt or compiler.txt and by its hash, which `make lock` writes
# into requirements/. torch is the exception: its wheel may be the CPU build of another index, with a hash of its own,
# and the default one brings CUDA libraries. pip wants hashes of all or of none, so torch is installed by itself.
HASHED := $(PIP) install --no-deps --require-hashes --requirement

# What the package and the demo need; tests and linters need everything that constraints.txt pins.
$(BASE): $(BIN)/python
	@rm -f $(VENV)/.base-*
	@echo "Installing torch and what the build and the demo need (once)"
	$(HASHED) requirements/base.txt
	$(PIP) install --constraint constraints.txt torch
	@touch $@

$(TOOLS): $(BASE)
	@rm -f $(VENV)/.tools-*
	@echo "Installing the tools that constraints.txt pins (once)"
	$(HASHED) requirements/all.txt
	@touch $@

# The kernels of the tests are compiled by what pip brings, and run on the simulated device.
$(COMPILER): $(BASE)
	@rm -f $(VENV)/.compiler-*
	@echo "Installing the CUDA compiler that compiler.txt pins (once)"
	$(HASHED) requirements/compiler.txt
	@touch $@

# A CUDA driver of the tests' own. The build folder is kept: an edit compiles what it touches.
$(SIMULATOR): $(BASE)
	@rm -f $(VENV)/.simulator-*
	@echo "Building and installing the simulated device"
	@$(PIP) install --quiet --no-deps --no-build-isolation --config-settings=build-dir=$(abspath build/simulator) tests/simulator
	@touch $@

# The hashes of every file of each pinned release, for all Pythons and platforms. BASE_NAMES: what the build and the
# demo import, and what torch needs.
BASE_NAMES := cmake ninja pybind11 scikit-build-core matplotlib tqdm \
	filelock fsspec jinja2 networkx setuptools sympy typing-extensions
LOCK := build/lock/bin/uv pip compile --quiet --generate-hashes --no-annotate --python-version 3.11 \
	--python-platform linux --custom-compile-command "make lock"
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip --disable-pip-version-check install --quiet uv==0.13.9
	@mkdir -p requirements
	printf '%s\n' $(BASE_NAMES) | $(LOCK) --constraint constraints.txt - --output-file requirements/base.txt
	grep -v '^torch==' constraints.txt | $(LOCK) --no-deps - --output-file requirements/all.txt
	$(LOCK) --no-deps compiler.txt --output-file requirements/compiler.txt

# The package is installed as a user would have it, never in editable mode: what is tested is what ships.
$(PACKAGE): $(BASE)
	@rm -f $(VENV)/.package-*
	@echo "Building and installing flash8"
	@$(PIP) install --quiet --no-deps --no-build-isolation .
	@touch $@
