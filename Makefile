# Every target needs Python 3.11 or newer, pip and make; the first one called sets up what it runs in.
PYTHON ?= python3
VENV := .venv
BENCH := .venv-bench

# An announcement of other tools, printed at every build.
export NO_MKDOCS_2_WARNING := 1

PLUGINS := $(sort $(wildcard plugins/*/pyproject.toml))
EDITABLE := $(foreach plugin,$(PLUGINS),--editable ./$(patsubst %/,%,$(dir $(plugin))))
# The folder itself is newer than the stamp once a plugin came or went.
PROJECTS := pyproject.toml plugins $(PLUGINS)

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

demo: $(VENV)/.installed  ## Find flipped labels in a small data set, and write a page about it
	$(VENV)/bin/influence demo

test: $(VENV)/.installed  ## Run every test, those of the plugins and of the documentation included
	$(VENV)/bin/python -m pytest --numprocesses auto

lint: $(VENV)/.installed  ## Check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed  ## Build the documentation into site/
	$(VENV)/bin/mkdocs build --strict --quiet

bench: $(BENCH)/.installed  ## Measure against other libraries, each in an environment of its own
	$(BENCH)/bin/python benchmarks/comparison/compare.py
	$(BENCH)/bin/python benchmarks/run.py

clean:  ## Remove the environments, built documentation and caches
	rm -rf $(VENV) $(BENCH) .venv-peers benchmarks/comparison/cache site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Makes the environment $(1) unless it is there. The pip that comes with Python may be too old for
# dependency groups, so it is brought to the version pinned.
define environment
test -x $(1)/bin/python || { \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")' \
	&& $(PYTHON) -m venv $(1); }
$(1)/bin/python -m pip install --quiet --constraint constraints.txt pip
endef

# The stamps: nothing is installed while they are newer than all that they were made from. An environment
# without a stamp is kept, and installed into.
$(VENV)/.installed: $(PROJECTS) constraints.txt
	@echo "Setting up $(VENV), which takes a minute or two the first time ..."
	$(call environment,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt \
		--group test --group lint --group docs --editable '.[demo]' $(EDITABLE)
	@touch $@

$(BENCH)/.installed: $(PROJECTS) benchmarks/requirements.txt constraints.txt
	@echo "Setting up $(BENCH), which takes a minute or two the first time ..."
	$(call environment,$(BENCH))
	$(BENCH)/bin/python -m pip install --quiet --build-constraint constraints.txt \
		--requirement benchmarks/requirements.txt --editable . $(EDITABLE)
	# kronfluence asks for torchvision without using it; beside a torch for CPUs, transformers breaks on it.
	$(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@
