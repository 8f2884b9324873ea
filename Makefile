# Every target sets itself up: it needs Python 3.10 or newer with the venv module, and puts the rest into .venv. Tests of the
# npu backend run on a simulator, in .venv-npu: where torch_npu is installed, nothing else can import torch without it.

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Outlives an install that was cut short, after which pip may take half a package for a whole one.
UNFINISHED := $(VENV)/.unfinished

NPU_VENV := .venv-npu
ON_NPU = OMP_NUM_THREADS=1 $(NPU_VENV)/bin/ascend-sim run --devices 2 --

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test test-cpu test-npu lint certificates clean

help:
	@echo 'make demo    train a tiny LLaVA on the CPU        ARGS="…" goes to `llava-core demo`'
	@echo 'make test    check the code, then run the tests   PYTEST_ARGS="…" goes to pytest, WORKERS=$(WORKERS) run at once'
	@echo '             test-cpu and test-npu run the two halves: without and with a simulated NPU'
	@echo 'make lint    check the code only'
	@echo 'make certificates   certify what can be here, and write the table in README.md anew'
	@echo 'make clean   delete caches and build outputs; runs/ and .venv stay'
	@echo
	@echo 'The first run installs into .venv with PYTHON=$(PYTHON); later runs install only what changed.'

demo: $(VENV)/.installed-demo
	@$(BIN)/llava-core demo $(ARGS)

test: test-cpu test-npu

test-cpu: lint
	@$(run_tests)

test-npu:
	@$(run_npu_tests)

certificates: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/llava-core certify --backend cpu --json docs/certificates/cpu.json
	@$(MAKE) --no-print-directory VENV=$(NPU_VENV) $(NPU_VENV)/.installed-npu
	@$(ON_NPU) llava-core certify --backend npu --json docs/certificates/npu.json
	@$(BIN)/python docs/what_works.py

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo 'lint: clean'

clean:
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find . \( -path ./$(VENV) -o -path ./$(NPU_VENV) \) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The quick tests first, so that a plain mistake is known early; pytest's status 5 says that a part has no test.
# One thread a worker: two threads each on two busy cores are far slower than one.
define run_tests
pytest() { OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal "$$@" $(PYTEST_ARGS); }; \
	quick=0; slow=0; \
	pytest -m "not slow" || quick=$$?; \
	case $$quick in 0|5) ;; *) exit $$quick;; esac; \
	pytest -m slow || slow=$$?; \
	case $$slow in 0|5) ;; *) exit $$slow;; esac; \
	if [ $$quick$$slow = 55 ]; then echo 'No test was run: nothing matches PYTEST_ARGS=$(PYTEST_ARGS)' >&2; exit 5; fi
endef

# The simulator's own tests, those of the rest that concern a device, and the conformance kit.
# Compilers are looked for one by one: of several names, dash's `command -v` looks for the first alone.
define run_npu_tests
[ "$$(uname -s)" = Linux ] || { echo 'test-npu was not run: the simulator of an NPU needs Linux'; exit 0; }; \
	{ [ -n "$$CC" ] || command -v cc || command -v gcc || command -v clang; } >/dev/null || { echo 'test-npu was not run: the simulator needs gcc or clang'; exit 0; }; \
	set -e; \
	$(MAKE) --no-print-directory VENV=$(NPU_VENV) $(NPU_VENV)/.installed-npu; \
	pytest() { $(ON_NPU) python -m pytest -q -n $(WORKERS) --dist worksteal "$$@" || [ $$? = 5 ]; }; \
	$(if $(PYTEST_ARGS),:,pytest plugins/ascend_simulator/tests); \
	pytest --backend npu $(PYTEST_ARGS); \
	$(if $(PYTEST_ARGS),:,$(ON_NPU) llava-core certify --backend npu)
endef

PACKAGES_demo := -e '.[demo]'
PACKAGES_test := -e '.[test]'
PACKAGES_npu := -e '.[test,npu]' -e 'plugins/ascend_simulator[test]'

# What a target needs installed; a change of pyproject.toml or constraints.txt installs again.
$(VENV)/.installed-%: $(BIN)/python pyproject.toml constraints.txt
	@rm -f $@
	@if [ -e $(UNFINISHED) ]; then \
		echo 'The last install was cut short: starting $(VENV) afresh.'; \
		find $(VENV) -mindepth 1 ! -path $(UNFINISHED) -delete; \
		$(make_venv); \
	fi
	@touch $(UNFINISHED)
	@echo 'Installing llava-core and what it needs into $(VENV) (some minutes the first time) …'
	@$(PIP) install -qq -c constraints.txt torch
	@$(PIP) install -qq -c constraints.txt $(PACKAGES_$*)
	@rm $(UNFINISHED)
	@touch $@

$(BIN)/python:
	@$(make_venv)
	@rm $(UNFINISHED)

define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo 'llava-core needs Python 3.10 or newer; PYTHON=$(PYTHON) answers:' \
			"$$($(PYTHON) --version 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }; \
	$(PYTHON) -c 'import venv, ensurepip' || { \
		echo 'PYTHON=$(PYTHON) cannot make a virtual environment. Install its venv module (on Debian and Ubuntu: the' \
			'package python3-venv) or name another: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; exit 1; }; \
	mkdir -p $(VENV) && touch $(UNFINISHED) && $(PYTHON) -m venv $(VENV)
endef
