# make book | pdf | test | lint | bench | torture | clean | help
#
#   PYTHON        the interpreter that .venv is made with      make book PYTHON=python3.12
#   PROFILE       digits (minutes on two CPU cores), short, paper   make book PROFILE=short
#   NPMERGE_DATA  the folder that holds the CIFAR files        make test NPMERGE_DATA=~/data
#   GPU           run the tests that need a CUDA device too    make test GPU=1
#   SECONDS       that the fuzzers may take (300)              make torture SECONDS=3600

PYTHON ?= python3
PROFILE ?= digits
SECONDS ?= 300
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

LEFT_OUT := $(strip $(if $(NPMERGE_DATA),,cifar) $(if $(GPU),,gpu))
SPACE := $() $()
MARKED := $(patsubst %,and not %,$(LEFT_OUT))
SIDE_BY_SIDE := $(if $(GPU),,-n auto --dist loadfile)

.DELETE_ON_ERROR:
.PHONY: help install book pdf test lint bench torture clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@sed -n 's/^#   /  /p' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv and install npmerge into it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "npmerge needs Python 3.11 or newer, $(PYTHON) is `$(PYTHON) --version 2>&1`: try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e ".[book,test]"
	@touch $@

book: $(INSTALLED) ## execute the notebooks and render the book
	$(BIN)/npmerge book --profile $(PROFILE)

pdf: $(INSTALLED) ## the book, and all of it as one PDF (needs Chromium or Chrome)
	$(BIN)/npmerge book --profile $(PROFILE) --pdf

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy npmerge

# The book's build and the notebooks' check share one folder of results, and it is a fresh one.
test: export NPMERGE_RESULTS := $(CURDIR)/.cache/test/results
test: export NPMERGE_ZOO := $(CURDIR)/.cache/test/zoo
test: lint ## everything: lint, unit tests, notebooks, the book and its pages in a browser
	@rm -rf .cache/test
	$(BIN)/python tests/browser.py
	@echo "$(if $(LEFT_OUT),Left out: tests marked $(subst $(SPACE),$(SPACE)and ,$(LEFT_OUT)) (cifar needs NPMERGE_DATA=FOLDER; gpu needs GPU=1).,Nothing is left out.)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not book $(MARKED)"
	$(BIN)/python -m pytest -m "book $(MARKED)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) --nbval --nbval-current-env --nbval-cell-timeout=900 notebooks

bench: $(INSTALLED) ## speed and memory beside what one would use instead
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

torture: $(INSTALLED) ## kills, flipped bits, full disks, fuzzers: up to an hour, and a new table of what came of it
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture --output results/benchmarks/torture.csv --seconds $(SECONDS)

clean: ## remove the built book and the tools' caches; results and trained models stay
	rm -rf _build .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
