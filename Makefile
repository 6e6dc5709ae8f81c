# make demo    install, build, validate, run the main job on real photographs, write out/report/index.html
# make test    every rung of tests that this machine can run
# make lint    ruff, clang-format, pyright
# make bench   the benchmarks of this machine, recorded under benchmarks/results/
# make gpu     on a machine with a GPU: rung 6, compute-sanitizer, benchmarks; PYTHON=python3 uses its own torch
#
# demo, test, lint and bench create .venv where it is missing, and build again where sources changed.
PYTHON ?=
OPS ?=
SHELL := /bin/bash

ifeq ($(PYTHON),)
BIN := .venv/bin/
RUN := .venv/bin/python
READY := .venv/.built
else
BIN :=
RUN := $(PYTHON)
READY := build/.in-place
endif

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint bench tables gpu gates clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(RUN) -m mpkernels info
	$(RUN) -m mpkernels validate --output out/report
	$(RUN) -m mpkernels demo composite --output out/report
	$(RUN) -m mpkernels report --output out/report
	@echo "The report: out/report/index.html"

test: $(READY)
	$(RUN) -m pytest --numprocesses auto --dist worksteal

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tests/*.cuh' | xargs $(BIN)clang-format --dry-run --Werror
	$(BIN)pyright --pythonpath $(RUN)

bench: $(READY)
	$(RUN) -m mpkernels bench $(OPS) --record

# the tables of README.md and docs/, from the specs and the recorded results
tables: $(READY)
	$(RUN) benchmarks/tables.py

# the table that `mpkernels info --kernels` prints, after a change to a GPU kernel
gates: $(READY)
	$(RUN) -m mpkernels.profiling.static --write

gpu: $(READY)
	$(RUN) benchmarks/gpu.py $(OPS)

# torch is pinned, and the package is built against it without isolation: nothing fetches a second torch.
.venv/.torch: requirements/torch.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	touch $@

.venv/.tools: requirements/develop.txt requirements/nvcc.txt .venv/.torch
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements/develop.txt
	command -v nvcc >/dev/null || .venv/bin/pip install --quiet --disable-pip-version-check -r requirements/nvcc.txt
	touch $@

.venv/.built: $(SOURCES) .venv/.tools
	PATH="$(CURDIR)/.venv/bin:$$PATH" MPKERNELS_BUILD=require \
		.venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

# With a Python that has torch already: build in place, download nothing.
build/.in-place: $(SOURCES)
	mkdir -p build
	MPKERNELS_BUILD=require $(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build out .venv mpkernels/_libraries mpkernels/_host*.so
