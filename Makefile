# Every target makes the virtual environment it needs. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LINKS := build/types
TEST_FOLDERS := $(shell find tests -name '[a-z]*' -type d)
PATHS := $(subst $() ,:,$(addprefix penstock/,$(TEST_FOLDERS))):penstock/bench:penstock/bench/peers:penstock/examples

.DEFAULT_GOAL := help
.PHONY: help demo test test-kinds test-cluster lint types check bench clean

help:
	@echo "make demo    make a small checkpoint and stream it (examples/demo.py)"
	@echo "make test    run the tests"
	@echo "make test-kinds  run a part of them as on other machines"
	@echo "make test-cluster  run those on the nodes of a Ray cluster"
	@echo "make check   everything a change must pass: lint, types, test"
	@echo "make lint    ruff: rules and format"
	@echo "make types   mypy, strict"
	@echo "make bench   measure streaming against its ceiling (bench/stream.py)"
	@echo "make clean   remove .venv, caches and build output"
	@echo
	@echo "The first of them installs into $(VENV), once, the versions in constraints.txt."
	@echo "Another Python (3.11 or newer):  make test PYTHON=python3.12"
	@echo "No GPU? This saves gigabytes of CUDA libraries:"
	@echo "    export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# As many processes as tests/conftest.py says; threads of products that wait for each
# other must not spin.
test: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --dist worksteal

# What depends on the machine, as on others: CPUs without AVX-512, or without AVX; no
# libaio; no compiler. (The tests themselves run the reader of libaio everywhere.)
test-kinds: export OMP_WAIT_POLICY = passive
test-kinds: $(STAMP)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
		$(BIN)/python -m pytest -q -m kinds tests/offload/test_architectures.py \
		tests/io/weights/test_residue.py
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
		$(BIN)/python -m pytest -q -m kinds tests/offload/test_architectures.py \
		tests/io/weights/test_residue.py
	CC=/nonexistent/cc CXX=/nonexistent/c++ $(BIN)/python -m pytest -q --libaio=missing \
		tests/io/readers/test_choice.py tests/io/readers/test_readers.py tests/offload/engine/test_compilation.py

# Real nodes of a cluster, which take two minutes to start.
test-cluster: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --whole tests/offload/jobs/test_ray.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy names a module after its folders, and this folder may be called anything, so
# it looks through a link called penstock. Sibling imports of scripts are found too.
types: $(STAMP)
	@mkdir -p $(LINKS) && ln -sfn ../.. $(LINKS)/penstock
	cd $(LINKS) && MYPYPATH=$(PATHS) \
	    $(abspath $(BIN))/mypy --config-file penstock/setup.cfg \
	    --explicit-package-bases \
	    $(addprefix penstock/,__init__.py __main__.py io scheduler offload tests bench examples)

check: lint types test

bench: $(STAMP)
	$(BIN)/python bench/stream.py

clean:
	rm -rf .venv build dist *.egg-info .coverage htmlcov
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "penstock needs Python 3.11 or newer, $(PYTHON) is %d.%d; " \
	    "name another: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing into $(VENV): a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,dev]"
	$(BIN)/python -m compileall -q __init__.py io offload scheduler
	@touch $@
