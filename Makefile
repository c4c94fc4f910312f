PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed compiles its communication op on first use: once per checkout, not into the user's home.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Images of containers often forbid Python to keep bytecode. Each start of a rank would compile its imports: 12 s, not 4.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv pretrain baseline compare moments masters muon communication int8 study study-smoke test test-all test-kills test-stack stack-tests check docs lint built pytest clean

help:
	@echo "make pretrain   pre-train the tiny model in W8A8 (sets everything up first)"
	@echo "make check      lint, types, import layers and the quick tests"
	@echo "make test       lint, types, import layers, the docs and all tests but the slow ones"
	@echo "make test-all   the same with the slow tests: more ranks, more points at which a run is killed"
	@echo "make docs       the documentation as a site, into build/site"
	@echo "make baseline   the same run in full precision, into runs/tiny-baseline"
	@echo "make compare    both runs and their curves in one picture"
	@echo "make moments    losses of the recipes of the moments, some 30 runs of two minutes"
	@echo "make masters    losses with masters of 24 and 16 bits, 12 runs of two minutes"
	@echo "make communication   losses with gradients in few bits on the wire, 4 ranks, some 15 runs"
	@echo "make int8       losses with int8 linear layers, 15 runs of two minutes"
	@echo "make study      the paper's matrix and its repairs at the smallest size: some 1300 runs of one to three minutes"
	@echo "make study-smoke   three short runs of it, against limits that were measured, two minutes"
	@echo "make test-kills  kill a run of two ranks at 200 points drawn from a seed, 15 minutes"
	@echo "make test-stack STACK=oldest   quick, engine, kernel and distributed tests with the oldest versions, an hour and 6 GB"
	@echo "make clean      remove the environment and the build caches (not runs/)"

venv: $(VENV)/.installed

CONSTRAINTS := constraints.txt
# Python compiles what is imported. Compiling all of some 20,000 files would take a minute.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@echo "Installing the pinned packages into $(VENV) (once, some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) --editable '.[launch,plot,dev,docs]'
	@touch $@

pretrain: venv
	deepspeed launchers/pretrain.py --deepspeed ds_configs/w8a8.json

baseline: venv
	deepspeed launchers/pretrain.py --deepspeed ds_configs/baseline.json --output_dir runs/tiny-baseline

compare: pretrain baseline
	python launchers/pretraining/compare.py runs/tiny-baseline runs/tiny --output runs/compare.png

moments: venv
	python tests/convergence/moment_losses.py

masters: venv
	python tests/convergence/master_losses.py

muon: venv
	python tests/convergence/muon_losses.py

communication: venv
	python tests/convergence/communication_losses.py

int8: venv
	python tests/convergence/int8_losses.py

# First what has no work for two cores, two at a time.
test: venv
	$(MAKE) --jobs 2 --output-sync lint docs built
	$(PYTEST)

# All that the protocol of docs/study.md asks for at the smallest size; what was done is not done again, but for the
# baseline's models, from which the commands after it start and which a fresh clone does not have.
study: venv
	python launchers/study.py run
	python launchers/study.py run --scales 0.5 2
	python launchers/study.py repeat --rows baseline --seeds 0-2
	python launchers/study.py post-training
	python launchers/study.py adapt
	python launchers/study.py isolate
	python launchers/study.py tables

study-smoke: venv
	python launchers/study.py smoke

# For every change: the rooms below the engine, but for tests that start other processes or compile graphs.
QUICK := $(addprefix tests/,base config numerics linear comm optim)
check: lint
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu python -m pytest --quiet --numprocesses 2 --hypothesis-profile quick -m "not slow and not distributed and not thorough" $(QUICK)

docs: export NO_MKDOCS_2_WARNING := 1
docs: venv
	mkdocs build --quiet

test-all:
	$(MAKE) test MARKERS=

test-kills: venv
	python tests/launchers/kill_points.py --kills 200

lint: venv
	ruff check .
	ruff format --check .
	mypy
	lint-imports

# Three files at a time, one thread each: tests of Slurm and of runs that are killed wait more than they compute.
# WORKERS=0 runs all in one process. What all jobs would build at once is built first.
WORKERS ?= 3
MARKERS ?= not slow
BUILD_OP = python -c "import deepspeed; deepspeed.get_accelerator().create_op_builder('ShareMemCommBuilder').load()"
BUILD_KERNELS = python -c "from ds_quant.kernels import build; build.load()"
PYTEST = python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 -m "$(MARKERS)"
test built pytest stack-tests: export DS_ACCELERATOR := cpu
test built pytest stack-tests: export OMP_NUM_THREADS := 1
built: venv
	$(BUILD_OP)
	$(BUILD_KERNELS)

pytest: built
	$(PYTEST)

# Not in CI. tests/stacks has the versions, docs/stacks.md what came out.
STACK ?= oldest
STACK_TESTS ?= $(QUICK) $(addprefix tests/,engine kernels distributed)
test-stack: STACK_VENV := .venv-$(STACK)
test-stack:
	$(MAKE) stack-tests VENV=$(STACK_VENV) CONSTRAINTS=tests/stacks/$(STACK).txt TORCH_EXTENSIONS_DIR=$(CURDIR)/$(STACK_VENV)/torch_extensions

stack-tests: venv
	$(BUILD_OP)
	$(PYTEST) $(STACK_TESTS)

clean:
	rm -rf $(VENV) .venv-* .cache build *.egg-info
