# Every target makes .venv if it is not there; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := .benchmark.json

.DEFAULT_GOAL := help
.PHONY: help install demo test test-full lint docs bench bench-gpu bench-host roofline matrix kernel-report clean

help:
	@echo "make demo           tune a small pretrained ViT to handwritten digits (about 2 minutes)"
	@echo "make test           the test suite; the kernels run in it, on the CPU where there is no GPU"
	@echo "make test-full      every shape of every kernel (long)"
	@echo "make lint           ruff, mypy, import rules, sizes, and the site, built strictly"
	@echo "make docs           the site of the documents, into site/"
	@echo "make bench          this machine: compared with eager PyTorch (9 to 17 minutes)"
	@echo "make bench-gpu      the same on a CUDA GPU, in 9 minutes: docs/benchmarks/gpu.md (ARGS='--minutes 5')"
	@echo "make bench-host     the host's time of a step, with a null driver (needs no GPU)"
	@echo "make roofline       a training step's work, counted, and its time on named GPUs, modelled"
	@echo "make matrix         the wheel in fresh environments: docs/versions.md (6 GB and minutes each)"
	@echo "make kernel-report  the kernels' machine code compared with its limits (needs no GPU)"
	@echo "make clean          remove .venv and caches"

$(INSTALLED): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# ttsem runs the Triton kernels on the CPU; its metadata asks for a newer Python than it needs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --constraint constraints.txt ttsem
	@touch $(INSTALLED)

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m vpt_fast.train.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not full' --numprocesses auto --dist loadgroup --no-loadscope-reorder

test-full: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m bench.studies.sizes
	$(BIN)/mkdocs build --strict

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/compare -q --benchmark-enable --benchmark-json=$(RUN) --benchmark-columns=median,iqr,min,max,rounds
	$(BIN)/python -m bench.compare.plots "$$($(BIN)/python -m bench.compare.collect $(RUN))"

# A GPU that is lent for minutes comes without a network: there $(PYTHON) itself is taken, if it has
# what the benchmark needs.
bench-gpu:
	@if $(PYTHON) -c 'import torch, timm, triton, matplotlib; assert torch.cuda.is_available()' 2>/dev/null; \
	then set -x; $(PYTHON) -m bench.gpu $(ARGS); \
	else $(MAKE) --no-print-directory install && set -x && $(BIN)/python -m bench.gpu $(ARGS); fi

bench-host: $(INSTALLED)
	$(BIN)/python -m bench.host
	$(BIN)/python -m bench.host.page
	$(BIN)/python -m bench.counted.roofline_page

roofline: $(INSTALLED)
	$(BIN)/python -m bench.counted.roofline

# Python 3.10 to 3.13 are taken from the path, or from pyenv.
matrix: $(INSTALLED)
	$(BIN)/python -m bench.matrix $(ARGS)

kernel-report: $(INSTALLED)
	$(BIN)/python -m bench.machine_code.kernel_report
	$(BIN)/python -m bench.counted.launches

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache build site *.egg-info
