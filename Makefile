# make quickstart   the whole way on real text: documents, work dir, training, resuming, evaluation (ten minutes)
# make test         all tests
# make torture      kills, power cuts, other layouts, damaged files, full disks: the table of docs/reliability.md (45 min)
# make check        format, lint, types, shell scripts
# make docs-check   every command in README.md and docs/ parses, every file they name exists
# make format       rewrite the sources as `make check` wants them
# make clean        remove .venv and caches; a quickstart's results stay
#
# The first of these to run makes .venv with the pinned requirements. Needs python3 (3.10 or newer) with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.requirements-installed
SCRIPTS := $(wildcard examples/*.sbatch examples/*/*.sh benchmarks/*.sh) .ci/run

# Threads of each of the two processes that torchrun starts here; unset, torchrun says that it sets one.
export OMP_NUM_THREADS ?= $(shell $(PYTHON) -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')

.PHONY: quickstart test torture chromium check docs-check format clean

quickstart: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/quickstart/run.sh

test: $(READY) chromium
	$(BIN)/python -m pytest -q

# ONLY="training layouts" takes some campaigns, ONLY=training:7 one trial.
torture: $(READY)
	PYTHONPATH=.:tests $(BIN)/python -m torture $(ONLY)

# A browser reads the page of tools/inspect_retro_data.py in one of the tests. Where there is none, and this is root on
# Debian, its package is installed; elsewhere that test is skipped, and says so.
chromium:
	@{ command -v chromium || command -v google-chrome || { \
	  test "$$(id -u)" = 0 && command -v apt-get && apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium; \
	}; } > /dev/null 2>&1 || echo "chromium is not here and could not be installed: its tests will be skipped"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	for script in $(SCRIPTS); do bash -n $$script || exit 1; done
	$(BIN)/shellcheck $(SCRIPTS)

docs-check: $(READY)
	$(BIN)/python tools/check_docs.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.txt requirements-no-deps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "python 3.10 or newer is needed; PYTHON=... names one")'
	@echo "Installing the pinned requirements into $(VENV): some minutes, some gigabytes where torch brings CUDA"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-no-deps.txt
	touch $@
