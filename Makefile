# `make bench` and `make test` need python3 (3.11+), make and a package index, and nothing else.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: bench test test-long test-rounding test-versions perf lint leaderboard clean

bench: $(READY)
	$(BIN)/python bench.py $(ARGS)

# A process per core with one thread each, since most tests start processes or import; where they use more threads, these must not spin for a core that
# the other process has. A file stays together: its tests share what is expensive to make.
test: $(READY)
	OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 $(BIN)/python -m pytest -m "not long" -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# What takes minutes each: trainings killed twenty times, by events and by the clock.
test-long: $(READY)
	$(BIN)/python -m pytest -m long $(ARGS)

# What depends on rounding, as other processors compute it; ARGS='-m "not long"' runs the whole suite so. Lasts minutes per setting.
test-rounding: $(READY)
	$(BIN)/python tests/rounding.py $(ARGS)

# The suite with every minor release of torch that is supported, each in an environment of its own (.venvs, some GB each); VERSIONS="2.10 2.13" names some.
test-versions: $(READY)
	VERSIONS="$(VERSIONS)" $(BIN)/python tests/versions.py $(ARGS)

# Times the pieces, saves the run in .benchmarks, and shows it beside the last saved one, if there is one.
perf: $(READY)
	$(BIN)/python -m pytest benchmarks/perf --benchmark-enable --benchmark-autosave --benchmark-compare \
	  --benchmark-max-time=0.3 --benchmark-sort=name --benchmark-columns=min,median,iqr,rounds $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .

leaderboard: $(READY)
	$(BIN)/python bench.py leaderboard

# The environment is made anew whenever the dependencies change. uv is used where it is on the PATH.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed; say make PYTHON=...")'
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && uv pip install --quiet --python $(BIN)/python -e '.[test]'; \
	else \
	  $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'; \
	fi
	@touch $(READY)

clean:
	rm -rf $(VENV) .venvs results/checkpoints results/logs results/quick
