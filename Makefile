# make demo       trains, sparsifies, prunes and distils a small YOLOv4 and compares the stages
# make test       runs the tests that are not marked as slow: 10 to 20 minutes on 2 cores
# make test-ci    runs the slow ones, too, but for those that show the same once more: up to 40 minutes
# make test-all   runs all tests: about an hour
# make lint       runs ruff
# make docs       builds the documentation, docs/_build/index.html
# Each makes .venv first, if it is missing (make env).

SHELL := /bin/bash
# Not PYTHON, which may name the user's own for make_env.sh
VENV_PYTHON := .venv/bin/python

# make demo DATA=path/to/folder uses your own data, in PASCAL VOC's layout; CHECKPOINT=weights.pth
# begins from weights, of other classes too, with CONFIG=mmyolo::... that they are of
DATA ?=
CHECKPOINT ?=
WORK_DIR ?= work_dirs/demo
DEMO_DATA := work_dirs/demo-data
ifeq ($(strip $(DATA)),)
CONFIG ?= configs/yolov4/yolov4_n_fast_1xb8-48e_demo-160.py
else
CONFIG ?= configs/yolov4/yolov4_n_fast_1xb8-60e_voc-320.py
endif
# One core is left to the data loader
export OMP_NUM_THREADS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n > 2 ? n - 1 : 1)))
# More arguments of tools/compress.py, as ARGS='--target-params 0.5'
ARGS ?=

.PHONY: env demo test test-ci test-all lint docs

env:
	@tools/environment/make_env.sh .venv

demo: env
ifeq ($(strip $(DATA)),)
	@$(VENV_PYTHON) tools/dataset_converters/make_demo_dataset.py $(DEMO_DATA)
endif
	@$(VENV_PYTHON) tools/compress.py $(CONFIG) --data $(or $(strip $(DATA)),$(DEMO_DATA)) \
		--work-dir $(WORK_DIR) $(addprefix --cfg-options load_from=,$(CHECKPOINT)) $(ARGS)

# worksteal: a process gets neighbouring tests, which share fixtures
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n 2 --dist worksteal

test: env
	@$(PYTEST) -m "not slow" tests

test-ci: env
	@$(PYTEST) -m "not exhaustive" tests

test-all: env
	@$(PYTEST) tests

lint: env
	@$(VENV_PYTHON) -m ruff check .

docs: env
	@$(VENV_PYTHON) -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
		$(VENV_PYTHON) -m pip install -q -r requirements/docs.txt
	@$(VENV_PYTHON) -m sphinx -q -W --keep-going -b html docs docs/_build
	@echo docs/_build/index.html
