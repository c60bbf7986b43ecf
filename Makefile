# ddrepro: every target sets up what it needs in .venv; a machine with make and Python 3.11 or newer is enough.
.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV  := .venv
RUN   := $(VENV)/bin
READY := $(VENV)/.ready

# the first Python >= 3.11 found; another one: make test PYTHON=/path/to/python
ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3.14 python3; do $$p -c '$(ENOUGH)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: help setup demo lint quick test gpu chapters readme docs wheel clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 12

setup: $(READY)  ## make .venv with ddrepro and all it needs (about 5 GB, most of it torch)

$(READY): settings.ini setup.py pyproject.toml
	@if [ ! -x $(RUN)/python ]; then \
	  if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(ENOUGH)' 2>/dev/null; then \
	    echo "ddrepro needs Python 3.11 or newer; found: $$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo none). Name another with: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	  "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }; \
	fi
	@$(RUN)/python -c '$(ENOUGH)' || { echo "$(VENV) holds an older Python than 3.11; remove the folder and run make again" >&2; exit 1; }
	@echo "installing ddrepro and what it needs into $(VENV): minutes, and about 5 GB with CUDA"
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY)  ## distil embedded data, evaluate, and write a report: a few minutes on a laptop
	$(RUN)/ddrepro demo

lint: $(READY)  ## ruff over package, notebooks, tests and scripts: seconds
	$(RUN)/python -m ddrepro.project lint

quick: $(READY)  ## lint, and the chapters and tests of what changed: under 3 minutes
	OMP_NUM_THREADS=1 $(RUN)/python -m ddrepro.project quick

test: $(READY)  ## everything: lint, chapters, modules and README in step, then tests/
	$(RUN)/python -m ddrepro.project lint
	OMP_NUM_THREADS=1 $(RUN)/python -m ddrepro.project test
	$(RUN)/python -m ddrepro.project check
	$(RUN)/python -m pytest -q -n auto --dist loadfile tests

gpu: $(READY)  ## on a GPU: the cells marked gpu, and reports/gpu_<card>.json
	$(RUN)/python -m ddrepro.bench_gpu

chapters: $(READY)  ## execute the chapters and save what they show (some: make chapters only="losses moments")
	OMP_NUM_THREADS=1 $(RUN)/python -m ddrepro.project chapters $(only)

readme: $(READY)  ## README.md from nbs/index.ipynb
	$(RUN)/python -m ddrepro.project readme

docs: $(READY)  ## the documentation site in _docs/index.html: three minutes at most, no network once set up
	OMP_NUM_THREADS=1 $(RUN)/python -m ddrepro.project docs

wheel: $(READY)  ## dist/*.whl and the source archive, with notebooks, data and report template inside, checked
	rm -rf build dist
	$(RUN)/python -m build --outdir dist . > dist.log || { cat dist.log; exit 1; }
	@rm -f dist.log
	$(RUN)/python -m twine check --strict dist/*
	@ls -sh dist

clean:  ## remove what builds leave behind; .venv, runs and reports stay
	rm -rf build dist *.egg-info _proc _docs nbs/_proc .pytest_cache .ruff_cache
	find ddrepro tests -name __pycache__ -type d -prune -exec rm -rf {} +
