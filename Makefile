# Everything a person needs, from a fresh clone: `make demo`, `make r1`, `make test`.
#   ACCELERATOR=cpu|cuda12|cuda13|tpu   the JAX build (default: the one that .venv holds, else cpu)
#   PYTHON=python3.12                   the Python that makes .venv (3.11 or newer)
#   PYTHON312=...                       the Python 3.12 of `make kernels` (default: the first that runs)
#   ARGS="--seed 1"                     more arguments for demo, r1, bench, test and notebook-server

VENV := .venv
PEER := .venv-peer
NEXT := .venv-jax011
PYTHON ?= python3
ACCELERATOR ?= $(shell cat $(VENV)/accelerator 2>/dev/null || echo cpu)
PYTHON312 ?= $(shell for found in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python; do \
  "$$found" -c '' 2>/dev/null && echo "$$found" && break; done)
ARGS ?=
# Large pages for large buffers: XLA on a CPU allocates its temporary ones anew in every step (docs/results/speed.md).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

BIN := $(VENV)/bin
# -qq: errors only
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# One stamp for what runs the package, one for what tests it; an older pyproject.toml leaves both alone.
INSTALLED := $(VENV)/installed-$(ACCELERATOR)
TESTABLE := $(VENV)/testable-$(ACCELERATOR)
KERNEL_TESTS := $(addprefix tests/kernels/test_,$(addsuffix .py,hopper decode_hopper look_up fp8_matmul attention_hopper))
PARITY := $(VENV)/parity-$(ACCELERATOR)
NOTEBOOK := $(VENV)/notebook-$(ACCELERATOR)
EXTRA_cpu :=
EXTRA_cuda12 := [cuda12]
EXTRA_cuda13 := [cuda13]
EXTRA_tpu := [tpu]

ifeq ($(filter $(ACCELERATOR),cpu cuda12 cuda13 tpu),)
$(error ACCELERATOR=$(ACCELERATOR) is not known: use cpu, cuda12, cuda13 or tpu)
endif

.DELETE_ON_ERROR:
# setup: what runs the package. install: what the tests and checks need too.
.PHONY: help demo r1 setup install test test-all parity kernels lint format notebook notebook-server peer bench wheel clean

help:
	@echo "make demo      set up and train a small DeepSeek from raw text to answers (runs/demo/)"
	@echo "make r1        R1-Zero, R1's four stages and a distilled student in miniature (runs/r1/)"
	@echo "make test      set up and run the tests             make test-all  those too that take long (an hour)"
	@echo "make parity    released models beside transformers (installs torch and transformers, pinned)"
	@echo "make kernels   the kernels' tests with jax 0.11, Mosaic GPU's interpreter included (Python 3.12, PYTHON312=...)"
	@echo "make lint      ruff and pyright          make format    let ruff rewrite the files"
	@echo "make notebook  execute the notebooks     make notebook-server   open them in JupyterLab (installs it)"
	@echo "make wheel     build the wheel and try it in an empty venv"
	@echo "make bench     speed, beside transformers (make peer: set it up in $(PEER))"
	@echo "make clean     remove caches, builds and venvs; runs/ stays"
	@echo "ACCELERATOR=cpu|cuda12|cuda13|tpu picks the JAX build, PYTHON=... the Python"

demo: $(INSTALLED)
	@$(BIN)/deepseek-jax demo $(ARGS)

r1: $(INSTALLED)
	@$(BIN)/deepseek-jax r1 r1/miniature $(ARGS)

setup: $(INSTALLED)

install: $(TESTABLE)

test: $(TESTABLE)
	@$(BIN)/python -m pytest $(ARGS)

# Those marked slow too: more meshes, whole steps compiled for TPUs.
test-all: $(TESTABLE)
	@$(BIN)/python -m pytest -m "" --timeout 1800 $(ARGS)

parity: $(PARITY)
	@$(BIN)/python -m pytest tests/parity $(ARGS)

# The interpreter that runs the Hopper kernels on a CPU needs jax 0.11, which needs Python 3.12. They import jax alone, so
# the package is not installed.
kernels:
	@if [ -z "$(PYTHON312)" ]; then \
	  echo "no Python 3.12 here, so the kernels' tests with jax 0.11 are left out (make kernels PYTHON312=...)"; \
	else \
	  $(MAKE) --no-print-directory $(NEXT)/installed && \
	  PYTHONPATH=kernels $(NEXT)/bin/python -m pytest $(KERNEL_TESTS) $(ARGS); \
	fi

lint: $(TESTABLE)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --warnings

format: $(TESTABLE)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

notebook: $(TESTABLE)
	@JAX_PLATFORMS=cpu $(BIN)/jupyter-execute --timeout=600 notebooks/*.ipynb

notebook-server: $(NOTEBOOK)
	@$(BIN)/jupyter-lab --notebook-dir=notebooks $(ARGS)

wheel: $(TESTABLE)
	@bash scripts/check_wheel.sh $(BIN)/python

peer: $(PEER)/installed

bench: $(INSTALLED) $(PEER)/installed
	@$(BIN)/python -m deepseek_kernels.bench
	@$(BIN)/deepseek-jax bench --peer-python $(PEER)/bin/python $(ARGS)

clean:
	@rm -rf $(VENV) $(PEER) $(NEXT) build dist .cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A venv holds one JAX build: asking for another accelerator makes it anew.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "deepseek-jax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1)." \
	       "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test "$$(cat $(VENV)/accelerator 2>/dev/null)" = "$(ACCELERATOR)" || { \
	  echo "making $(VENV) ($$($(PYTHON) -V), $(ACCELERATOR)) ..."; \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "'$(PYTHON) -m venv' failed: on Debian and Ubuntu install the package python3-venv." >&2; exit 1; }; \
	  echo $(ACCELERATOR) > $(VENV)/accelerator; }
	@echo "installing deepseek-jax$(EXTRA_$(ACCELERATOR)) and what it needs into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.$(EXTRA_$(ACCELERATOR))'
	@touch $@

$(TESTABLE): $(INSTALLED)
	@echo "installing what the tests need into $(VENV) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[test$(addprefix $(comma),$(filter-out cpu,$(ACCELERATOR)))]'
	@$(BIN)/python -m deepseek_kernels.compile_tpu --install
	@touch $@

$(PARITY): $(TESTABLE)
	@echo "installing torch and transformers into $(VENV) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[parity$(addprefix $(comma),$(filter-out cpu,$(ACCELERATOR)))]'
	@touch $@

$(NOTEBOOK): $(INSTALLED)
	@echo "installing JupyterLab into $(VENV) ..."
	@$(BIN)/python $(PIP_INSTALL) --editable '.[notebook$(addprefix $(comma),$(filter-out cpu,$(ACCELERATOR)))]'
	@touch $@

comma := ,

$(PEER)/installed: scripts/peer_requirements.txt
	@echo "installing transformers and torch into $(PEER) ..."
	@$(PYTHON) -m venv --clear $(PEER)
	@$(PEER)/bin/python $(PIP_INSTALL) --requirement scripts/peer_requirements.txt
	@touch $@

$(NEXT)/installed: Makefile
	@echo "making $(NEXT) ($$("$(PYTHON312)" -V)) with jax 0.11 ..."
	@"$(PYTHON312)" -m venv --clear $(NEXT)
	@$(NEXT)/bin/python $(PIP_INSTALL) 'jax>=0.11,<0.12' jaxtyping beartype hypothesis pytest pytest-timeout pytest-xdist
	@touch $@
