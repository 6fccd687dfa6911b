# make demo | test | test-slow | lint | docs | presets | bench | clean
# A bare machine with Python 3.10 or newer is enough; everything is installed into .venv (bench: .venv-bench).
PYTHON ?= python3
TESTS ?=  # of pytest: make test TESTS="-k warp"
WORKERS ?= 2  # processes that tests run in, one core each
VENV := .venv
BIN := $(VENV)/bin
VENV_BENCH := .venv-bench
BENCH ?=  # of benchmarks/run.py: make bench BENCH='cases=phantom methods=stnerp_fast,elastix_bspline'

.PHONY: demo test system test-slow lint docs presets bench clean

demo: $(VENV)/installed
	$(BIN)/python scripts/eval_interpolation.py experiment=demo overwrite=true

test: lint system docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# A browser for the report's tests, and a validator of DICOM files. Where they can't be had, those tests are skipped.
system:
	@for program in chromium chromedriver dciodvfy; do command -v $$program >/dev/null || missing=yes; done; \
	[ -z "$$missing" ] && exit; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
	then apt-get update -q && apt-get install -qy --no-install-recommends chromium chromium-driver dicom3tools; \
	fi || echo "no chromium, chromium-driver, dicom3tools: some tests will be skipped"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed
	$(BIN)/python -m sphinx -b html -W -n --keep-going -q docs docs/_build/html

presets: $(VENV)/installed
	$(BIN)/python scripts/write_presets.py

bench: $(VENV_BENCH)/installed
	$(VENV_BENCH)/bin/python benchmarks/run.py $(BENCH)

clean:
	rm -rf $(VENV) $(VENV_BENCH) *.egg-info .mypy_cache .ruff_cache .pytest_cache docs/_build
	find stnerp scripts benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu ship Python without venv.
define check_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "error: $(PYTHON) must be Python 3.10 or newer; try make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q && apt-get install -qy python3-venv; } \
	|| { echo "error: $(PYTHON) has no venv; install it (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2; exit 1; }
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(check_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The other methods need an older numpy than constraints.txt has, so they get a place of their own.
$(VENV_BENCH)/installed: pyproject.toml
	$(check_python)
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/python -m pip install -q torch
	$(VENV_BENCH)/bin/python -m pip install -q -e '.[scripts,peers]'
	@touch $@
