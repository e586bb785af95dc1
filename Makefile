# `make quickstart` and `make test` do all their own set-up; each step runs only when it has to.
PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart
WORKERS ?= 2
# The profile follows the machine: cuda where an NVIDIA driver answers, cpu elsewhere.
PROFILE ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
# On a machine without a GPU, torch's own index of CPU builds saves gigabytes: make TORCH_INDEX=<its address> …
TORCH_INDEX ?=
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALLED := $(VENV)/.installed-$(PROFILE)

SPARK := $(if $(shell command -v java),$(VENV)/.installed-spark)

.PHONY: quickstart test test-quick lint docs setup clean

# Two workers, each with whole files, slow ones first (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quickstart: setup
	@$(VENV)/bin/llm4msr quickstart --out $(OUT)

test: setup $(SPARK) lint
	$(PYTEST)

# What one runs between edits: neither processes that talk to each other, nor what takes seconds.
test-quick: setup
	$(PYTEST) -q -m "not (slow or distributed or namespaces or slurm)"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The pages, and the API from docstrings, as a site in build/site; needs no network once it is set up.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict

setup: $(INSTALLED)

$(INSTALLED): requirements/common.txt requirements/$(PROFILE).txt requirements/no-deps.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) for $(PROFILE); a few minutes the first time"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements/$(PROFILE).txt
	@$(PIP) --no-deps -r requirements/no-deps.txt
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(VENV)/bin/python -c 'import embeddings'
	@rm -f $(VENV)/.installed-* && touch $@

$(VENV)/.installed-spark: requirements/spark.txt $(INSTALLED)
	$(PIP) -r requirements/spark.txt
	@touch $@

$(VENV)/.installed-docs: requirements/docs.txt $(INSTALLED)
	$(PIP) -r requirements/docs.txt
	@touch $@

clean:
	rm -rf $(VENV)
