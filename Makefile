# Needs python3 (3.11 or later, with venv), make and a C compiler; `make help` lists the targets.
#
#   PYTHON=path/to/python   use that environment, with fxzero in it, as it is: no .venv, no install
#   PIP_ARGS="..."          more arguments for pip, such as an index that has CPU builds of torch
#   PYTEST_ARGS="..."       more arguments for pytest, such as -k budget
#   BENCH_ARGS="..."        arguments of the memory benchmark in `make bench-gpu`, such as --model llama
#   FUZZ_ARGS="..."         arguments of `make fuzz`, such as --inputs 1000
#   WORKERS=N               test processes at a time (default 2)

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
WORKERS ?= 2
PIP_ARGS ?=
PYTEST_ARGS ?=
FUZZ_ARGS ?=

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

# The repository root must not be on sys.path: kernels/ would be importable as top-level `kernels`,
# which other libraries look for.
export PYTHONSAFEPATH := 1

# A worker that dies ends the run, which would wait for its tests for ever.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest --max-worker-restart=0
FXZERO := $(PY) \
  -c "import sys; from fxzero.cli import main; sys.argv[0] = 'fxzero'; sys.exit(main())"

.PHONY: help demo demo-distributed test test-kernels test-quick test-exhaustive test-all faults fuzz lint bench bench-gpu clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) \
	  | awk -F'|' '{ printf "%-24s %s\n", $$1, $$2 }'

demo: $(READY)  ## plan and train a small model under a byte budget
	$(FXZERO) demo

demo-distributed: $(READY)  ## train it on two processes of this machine, sharded (ZeRO-3)
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node 2 \
	  examples/train_gpt.py --zero 3 --inner eager --steps 10

test: $(READY) test-kernels  ## run the tests that need no CUDA device, but for the rest of large matrices
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not cuda and not exhaustive and not interpreter" $(PYTEST_ARGS)

# Triton decides when it is imported whether kernels are interpreted, so these have their own process.
test-kernels: $(READY)  ## run kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) tests/interpreter $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-quick: $(READY)  ## the same without the slow ones
	$(PYTEST) -n $(WORKERS) --dist worksteal -m "not slow and not cuda and not exhaustive and not interpreter" $(PYTEST_ARGS)

test-exhaustive: $(READY)  ## those that `make test` leaves out: more seeds, models, ranks and sizes, within an hour
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "exhaustive and not cuda and not interpreter" $(PYTEST_ARGS)

test-all: $(READY) test-kernels  ## run every test, one at a time; those marked cuda are skipped without a device
	$(PYTEST) $(PYTEST_ARGS)

faults: $(READY)  ## kill, stall, deceive and starve trainings: the whole fault matrix, in about 3 minutes
	$(PYTEST) -n $(WORKERS) --dist load tests/faults $(PYTEST_ARGS)

fuzz: $(READY)  ## give 100,000 damaged files to the loaders of plans, checkpoints and the like
	PYTHONPATH=tests/fuzz:tests:$$PYTHONPATH OMP_NUM_THREADS=1 $(PY) tests/fuzz/run.py $(FUZZ_ARGS)

lint: $(READY)  ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# A benchmark may import a helper that lies beside it, hence no PYTHONSAFEPATH here.
bench: $(READY)  ## run benchmarks/bench_*.py, but for the one that needs a CUDA device; write docs/performance.md
	@for f in $(filter-out %/bench_kernels.py,$(wildcard benchmarks/bench_*.py)); do \
	  echo "== $$f"; env -u PYTHONSAFEPATH $(PY) "$$f" || exit 1; done
	$(PY) benchmarks/performance_page.py

bench-gpu: $(READY)  ## run the benchmarks of kernels and of memory on a CUDA device
	env -u PYTHONSAFEPATH $(PY) benchmarks/bench_kernels.py
	env -u PYTHONSAFEPATH $(PY) benchmarks/bench_memory.py --device cuda $(BENCH_ARGS)

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	  || { echo "fxzero needs Python 3.11 or later; python3 is $$(python3 -V 2>&1)" >&2; exit 1; }
	rm -rf $(VENV)
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[test]"
	@touch $@
