# Every target sets up what it needs in .venv first; only python3 (3.11 or later)
# with pip and venv is assumed.

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Where libtpu is installed, JAX looks for a TPU: it has an environment of its own.
TPU_VENV ?= .venv-tpu
# The Mosaic kernel needs a JAX of Python 3.12, and pytest.
MOSAIC_PYTHON ?= python3.12
MOSAIC_VENV ?= .venv-mosaic
# KerasHub asks for the whole of TensorFlow: what it really needs lies in a folder.
KERAS_HUB := $(VENV)/keras-hub

# The backend of `make demo`, and the backends of `make test` and `make bench-cpu`.
BACKEND := $(or $(KERAS_BACKEND),jax)
BACKENDS ?= jax torch tensorflow
PYTEST_ARGS ?= -q -n 2 --dist worksteal
# What `make test` leaves to `make test-all`.
SELECTION = -m 'not exhaustive'
DEMO_ARGS ?=
RECALL_ARGS ?=

# Keeps TensorFlow's start-up notices out of the output.
export TF_CPP_MIN_LOG_LEVEL ?= 3

# Test processes share what JAX has compiled, and Python, whatever the shell says of it:
# each of them would take many seconds to compile the frameworks' sources.
test: export PYTHONDONTWRITEBYTECODE :=
test: export PYTHONPYCACHEPREFIX ?= $(CURDIR)/$(VENV)/pycache
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/$(VENV)/jax-cache
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.1
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1

# The demo runs on the torch release that the tests run on.
pins_torch := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench-cpu recall test-keras-hub compile-tpu test-mosaic clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  make demo KERAS_BACKEND=torch      the demo on another backend (jax, torch, tensorflow)"
	@echo "  make demo DEMO_ARGS='--steps 50'   options for examples/quickstart.py"
	@echo "  make test BACKENDS=jax             the tests on one backend"
	@echo "  make test PYTEST_ARGS='-x -k mask' options for pytest (now: $(PYTEST_ARGS))"

demo: $(VENV)/.installed-$(BACKEND) ## Train, sample, save and reload a small language model
	KERAS_BACKEND=$(BACKEND) $(PY) examples/quickstart.py $(DEMO_ARGS)

test: $(VENV)/.installed-test ## Run the tests on every backend, then of the kernels
	@failed=""; \
	for backend in $(BACKENDS); do \
	    echo "==> tests on $$backend"; \
	    KERAS_BACKEND=$$backend $(PY) -m pytest tests --ignore=tests/kernels \
	        $(SELECTION) $(PYTEST_ARGS) || failed="$$failed $$backend"; \
	done; \
	echo "==> tests of the kernels"; \
	$(PY) -m pytest tests/kernels $(SELECTION) $(PYTEST_ARGS) || failed="$$failed kernels"; \
	if [ -n "$$failed" ]; then echo "==> FAILED:$$failed"; exit 1; fi; \
	echo "==> passed: $(BACKENDS) kernels"

test-all: SELECTION :=
test-all: test ## Run the tests that `make test` leaves out too

lint: $(VENV)/.installed-test $(VENV)/.installed-dev ## Run ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench-cpu: $(VENV)/.installed-test ## Time the layer on this machine's CPU, on every backend
	@set -e; for backend in $(BACKENDS); do \
	    echo "==> benchmark on $$backend"; \
	    KERAS_BACKEND=$$backend $(PY) benchmarks/cpu.py; \
	done

recall: $(VENV)/.installed-$(BACKEND) ## Train a layer of every update rule on associative recall
	KERAS_BACKEND=$(BACKEND) $(PY) benchmarks/recall.py $(RECALL_ARGS)

test-keras-hub: $(KERAS_HUB)/.installed ## Run KerasHub's own tests of backbones and tasks
	@set -e; for backend in $(BACKENDS); do \
	    echo "==> tests with KerasHub on $$backend"; \
	    PYTHONPATH=$(KERAS_HUB) KERAS_BACKEND=$$backend $(PY) -m pytest -q -k hub \
	        tests/test_keras_hub.py tests/test_samplers.py tests/test_generation.py; \
	done

compile-tpu: $(TPU_VENV)/.installed ## Compile the memory scan for TPUs, of which none is needed
	PYTHONPATH=kernels $(TPU_VENV)/bin/python tests/kernels/compile_tpu.py

test-mosaic: $(MOSAIC_VENV)/.installed ## Test the Mosaic kernel, under Python 3.12
	JAX_PLATFORMS=cpu $(MOSAIC_VENV)/bin/python -m pytest -q --noconftest \
	    tests/kernels/test_memory_scan_mosaic.py

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) $(TPU_VENV) $(MOSAIC_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(f"keras-mom needs Python 3.11 or later; this is {v[0]}.{v[1]}. Try: make PYTHON=python3.11" if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: a second run installs nothing unless pyproject.toml changed.
# What is imported is compiled then: all of it would take half a minute.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-compile $(pins_$*) -e '.[$*]'
	@touch $@

$(KERAS_HUB)/.installed: $(VENV)/.installed-test
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
	    --target $(KERAS_HUB) keras-hub==0.32.0 tensorflow-text==2.21.1 grain etils \
	    array-record cloudpickle portpicker importlib_resources zipp fsspec psutil regex
	@touch $@

$(TPU_VENV)/.installed: Makefile
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'jax[tpu]==0.10.2'
	@touch $@

$(MOSAIC_VENV)/.installed: Makefile
	$(MOSAIC_PYTHON) -m venv $(MOSAIC_VENV)
	$(MOSAIC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check jax==0.11.2 pytest
	@touch $@
