# Every target sets up what it needs (a virtual environment with pinned packages) and then does its job.
#
#   make demo        train a small ERNIE-4.5-VL to read real handwriting, on a CPU, in minutes; then evaluate it, and
#                    align another one that was stopped early, by its own mistakes; and teach the first one, by
#                    reinforcement learning, to look closer with a tool
#   make test        the test suite
#   make test-vllm   real vLLM against ours, in a virtual environment of its own (about 4 minutes to install, 2.5 GB)
#   make lint        ruff and pyright
#   make bench       speed against transformers
#   make dashboard   the local page with the runs' curves
#
# Variables:  PYTHON=python3.12   VENV=/somewhere/else   JOBS=4 (test workers)   TORCH_INDEX=<a package index with torch CPU builds>

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
VLLM_BASE ?= python3.11
JOBS ?= 2
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: demo test test-vllm lint format bench dashboard clean
.DELETE_ON_ERROR:

demo: $(VENV)/.test
	$(VENV)/bin/ernie sft experiment=digits
	$(VENV)/bin/ernie evaluate checkpoint=runs/digits tasks=[digits] precision=fp32 output=runs/digits/evaluation
	$(VENV)/bin/python -m tests.end_to_end.ask_transformers runs/digits
	$(VENV)/bin/ernie sft experiment=digits_weak
	$(VENV)/bin/ernie pairs checkpoint=runs/digits_weak tasks=[digits] attempts=4 precision=fp32 output=runs/digits_weak/pairs
	$(VENV)/bin/ernie dpo experiment=digits_dpo
	$(VENV)/bin/ernie evaluate checkpoint=runs/digits_weak tasks=[digits] precision=fp32 output=runs/digits_weak/evaluation
	$(VENV)/bin/ernie evaluate checkpoint=runs/digits_dpo tasks=[digits] precision=fp32 output=runs/digits_dpo/evaluation
	$(VENV)/bin/python -m tests.end_to_end.demo_table digits "after SFT=runs/digits_weak" "after DPO=runs/digits_dpo" --untrained
	$(VENV)/bin/ernie sft experiment=zoom_cold
	$(VENV)/bin/ernie evaluate checkpoint=runs/zoom_cold tasks=[zoom] precision=fp32 output=runs/zoom_cold/evaluation
	$(VENV)/bin/ernie rl experiment=zoom_rl
	$(VENV)/bin/ernie evaluate checkpoint=runs/zoom_rl tasks=[zoom] precision=fp32 output=runs/zoom_rl/evaluation
	$(VENV)/bin/python -m tests.end_to_end.demo_table zoom "cold start=runs/zoom_cold" "after RL=runs/zoom_rl"

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-vllm: $(VENV)/.test $(VLLM_VENV)/.installed
	VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(VENV)/bin/python -m pytest -m vllm tests/vllm

$(VLLM_VENV)/.installed:
	tests/vllm/install.sh $(VLLM_VENV) $(VLLM_BASE)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.test
	$(VENV)/bin/python -m tests.bench.train_step
	$(VENV)/bin/python -m tests.bench.memory
	$(VENV)/bin/python -m tests.bench.recompute
	$(VENV)/bin/python -m tests.bench.scaling
	$(VENV)/bin/python -m tests.bench.lora
	$(VENV)/bin/python -m tests.bench.quantize --sizes --speed
	$(VENV)/bin/python -m tests.bench.generation

dashboard: $(VENV)/.test
	$(VENV)/bin/ernie dashboard

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# ---- set-up -----------------------------------------------------------------------------------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "ernie-train needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first, because the plain Linux build brings several GB of CUDA libraries. Without a GPU we take the CPU build: from
# wherever pip already looks, else from TORCH_INDEX, and if neither can be reached the plain build, which runs on a CPU too.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	@if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  echo "installing torch $(TORCH)"; $(PIP) -q "torch==$(TORCH)" -c constraints.txt; \
	else \
	  echo "installing torch $(TORCH) for the CPU (nvidia-smi finds no GPU)"; \
	  $(PIP) -q --no-deps "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) -q --no-deps --retries 1 --timeout 15 --index-url "$(TORCH_INDEX)" "torch==$(TORCH)" 2>/dev/null \
	  || { echo "no CPU build within reach (tried pip's own sources and $(TORCH_INDEX)): taking the plain build, a large download"; \
	       $(PIP) -q "torch==$(TORCH)" -c constraints.txt; }; \
	fi
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -q -e ".[test]" -c constraints.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -q -e ".[test,dev]" -c constraints.txt
	@touch $@
