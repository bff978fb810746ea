# The two commands of the README: `make search` and `make test`. Both install the locked versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := constraints.txt
# Measured: one thread per process is faster than two on a small machine with several workers.
export OMP_NUM_THREADS ?= 1

.PHONY: search test check slow-test gpu-test lock test-newest test-oldest clean

search: $(VENV)/.installed-demo
	$(BIN)/python -m mamtra_ray.search $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(ARGS)

slow-test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# In an environment of its own: with mamba-ssm installed, transformers takes its kernels, and its hybrids no longer run on
# the CPU. Without mamba-ssm, which must be compiled, the tests run all the same and say so at the end.
gpu-test:
	@$(PYTHON) tests/gpu_run.py --card
	@$(MAKE) --no-print-directory .venv-gpu/.installed
	.venv-gpu/bin/python tests/gpu_run.py $(ARGS)

.venv-gpu/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --constraint $(LOCK) --editable '.[test]' setuptools wheel ninja
	.venv-gpu/bin/pip install --quiet --constraint $(LOCK) --no-build-isolation --editable '.[cuda]' \
		|| echo "mamba-ssm could not be built (see above): the tests run without its kernels"
	touch $@

# A search does without what the tests need.
$(VENV)/.installed-demo: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(LOCK) --editable '.[demo]'
	touch $@

$(VENV)/.installed-test: pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(LOCK) --editable '.[test]'
	touch $(VENV)/.installed-demo $@

# Chooses all locked versions anew. Then: `make test`, and commit constraints.txt.
# One version for every Python, so that what is installed is what was tested.
COMPILE := .venv-lock/bin/uv pip compile --quiet --python-version 3.11 --all-extras --no-annotate pyproject.toml

lock: .venv-lock/bin/uv
	$(COMPILE) --universal --fork-strategy fewest --upgrade --custom-compile-command 'make lock' --output-file $(LOCK)

.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet uv

# The newest versions that pyproject.toml allows, whatever they are today.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pytest $(ARGS)

# The lowest versions that pyproject.toml allows, beside today's versions of what these need: they may well complain.
test-oldest: .venv-lock/bin/uv
	$(PYTHON) -m venv .venv-oldest
	$(COMPILE) --resolution lowest-direct --output-file .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[test]'
	.venv-oldest/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::FutureWarning $(ARGS)

clean:
	rm -rf $(VENV) .venv-gpu .venv-lock .venv-newest .venv-oldest runs
