# Everything here works on a fresh machine with python3 (3.11 or later), make and a package index.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRACKS := $(VENV)/.tracks

.PHONY: setup run test check golden bench chaos clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: $(PYTHON) is too old: Python 3.11 or later, as in make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,dev]'
	touch $@

# The trackers, ONNX and Optuna: extras, and only tests use them all.
$(TRACKS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[trackers]'
	touch $@

# C-MAPSS FD001 on a spot node that is taken away twice; a few minutes on two cores.
run: $(READY)
	$(BIN)/runner simulate jobs/rul.yaml -p profile=quick \
	    --preempt step=150 --preempt step=1000 --grace 30s

# Two at a time, and each file's tests in their order: many wait for processes, few keep a core busy.
WORKERS ?= 2
test: $(READY) $(TRACKS)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict runner

# Files that tests compare whole; look at the difference before it is committed.
golden: $(READY)
	PYTHONPATH=tests $(BIN)/python -m golden

bench: $(READY) $(TRACKS)
	$(BIN)/python -m tests.bench.bench

# Runs that everything befalls, with real processes; N of them, drawn from SEED on. S3=1: with the
# store on a real S3 server (S3_ENDPOINT, or one of our own, which takes root).
N    ?= 25
SEED ?= 1
S3   ?=
chaos: $(READY)
	$(BIN)/python -m tests.chaos --histories $(N) --seed $(SEED) $(if $(S3),--s3)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis runs outputs
