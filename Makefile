# The two commands of the README: `make search` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Measured: one thread per process is faster than two on a small machine with several workers.
export OMP_NUM_THREADS ?= 1

.PHONY: search test check slow-test clean

search: $(VENV)/.installed
	$(BIN)/python -m mamtra_ray.search $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(ARGS)

slow-test: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
