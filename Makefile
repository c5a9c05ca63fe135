# Everything runs in .venv, made from constraints.txt. PYTHON names the interpreter to make it with (3.11 or newer).
PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test long install soak lint bench

demo: install
	$(BIN)/raysd demo

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or make $(MAKECMDGOALS) PYTHON=python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A thread a process: more would wait for each other on few cores. Unit tests use all cores; those that start Ray, servers and
# browsers run one after the other.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not long and not soak and not gpu' -n logical --dist loadfile tests/unit
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25 -m 'not long and not soak and not gpu' tests/integration

long: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations 25 -m 'long and not soak and not gpu'

soak: install
	RAYSD_SOAK_RESULTS=benchmarks/results/soaks $(BIN)/pytest -m 'soak or measured' --timeout 7200
	$(BIN)/python -m benchmarks --page

bench: install
	$(BIN)/python -m benchmarks
