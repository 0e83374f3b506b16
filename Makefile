# `make` lists the targets. PYTHON makes the virtual environment; everything runs in VENV.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 4
ARGS ?=
CXX ?= g++
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready
HOST_SOURCES := $(wildcard csrc/host/*.cpp)
CPP_FILES := $(shell find csrc tests/native -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)
# Starts programs on a GPU machine: a process a rank by torchrun, and CUDA's MPS where ranks share a GPU.
SHARE_GPU := $(BIN)/python -m moe_ep_plugin.share_gpu

.PHONY: help venv megatron deepspeed test test-gpu lint format types pretrain finetune decode example bench \
  bench-deepspeed bench-gpu bench-nvlink kernels tsan clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY)  ## Set up $(VENV): torch, this package (editable) and what tests and examples need

# torch first and on its own: the index decides between its CPU and GPU builds, and nothing later replaces it.
$(READY): setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,examples]'
	$(BIN)/python -m moe_ep_plugin
	touch $@

# The newest versions import triton on any machine.
megatron: $(READY)  ## Download the Megatron-Core versions that the tests run with, unless they are here
	@$(BIN)/python tests/integrations/fetch_frameworks.py megatron
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
	  $(BIN)/python -m pip install --disable-pip-version-check --retries 1 triton

deepspeed: $(READY)  ## Download the DeepSpeed versions that the tests run with, unless they are here
	@$(BIN)/python tests/integrations/fetch_frameworks.py deepspeed

test: $(READY)  ## All tests; ARGS="tests/test_wire.py -k nan" for some
	@$(MAKE) --no-print-directory megatron || \
	  echo "test: not everything for the Megatron tests could be downloaded; those that need it are skipped"
	@$(MAKE) --no-print-directory deepspeed || \
	  echo "test: not every DeepSpeed version could be downloaded; tests that need it are skipped"
	$(BIN)/python -m pytest $(ARGS)

test-gpu: $(READY)  ## Tests that need a GPU; options in ARGS
	$(SHARE_GPU) -- $(BIN)/python -m pytest tests/gpu $(ARGS)

lint: $(READY)  ## ruff and clang-format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run --Werror $(CPP_FILES))

format: $(READY)  ## Reformat Python and C++
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))

types: $(READY)  ## mypy on the package
	$(BIN)/mypy

# The options in ARGS come last and win.
pretrain: $(READY)  ## Train a small MoE GPT with Megatron-Core, RANKS processes; options in ARGS
	$(SHARE_GPU) --ranks $(RANKS) -- examples/pretrain_megatron_moe.py --save runs/pretrain/checkpoints $(ARGS)

finetune: $(READY)  ## Fine-tune an MoE model with DeepSpeed AutoEP, RANKS processes; options in ARGS
	$(SHARE_GPU) --ranks $(RANKS) -- examples/finetune_deepspeed_moe.py $(ARGS)

decode: $(READY)  ## Generate text with what pretrain has trained, RANKS processes; options in ARGS
	$(SHARE_GPU) --ranks $(RANKS) -- examples/decode_low_latency.py $(ARGS)

example: $(READY)  ## The API in thirty lines
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) examples/dispatch_combine.py $(ARGS)

bench: $(READY)  ## Host backend against index-permute and gloo all-to-all
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) tests/bench/bench_host.py $(ARGS)

bench-deepspeed: $(READY)  ## DeepSpeed's MoE layer on our dispatch against its own
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) tests/bench/bench_deepspeed.py $(ARGS)

bench-gpu: RANKS = 8
bench-gpu: BENCH ?= throughput
bench-gpu: $(READY)  ## CUDA backend against the alternatives, 8 ranks unless RANKS is given; BENCH=low_latency or fp8
	$(SHARE_GPU) --ranks $(RANKS) -- tests/bench/bench_$(BENCH).py $(ARGS)

bench-nvlink: $(READY)  ## All that takes several GPUs: links, correctness, figures beside NCCL, the example
	PYTHON=$(BIN)/python tests/bench/run_multi_gpu.sh

# setup.py has the flags and knows what is up to date. It needs an environment, not the newest build in it.
kernels: $(if $(wildcard $(BIN)/python),,$(READY))  ## Compile the CUDA kernels that changed; needs nvcc but no GPU
	$(BIN)/python setup.py --quiet kernels

tsan:  ## Stress the host protocol under ThreadSanitizer
ifeq ($(wildcard tests/native/host_stress.cpp),)
	@echo "tsan: skipped: tests/native/host_stress.cpp is not there"
else
	@set -e; mkdir -p build/tsan; avx2=$(AVX2); \
	for source in $(HOST_SOURCES) tests/native/host_stress.cpp; do \
	  flags=; case $$source in \
	    */kernels_avx2.cpp) test -n "$$avx2" || continue; flags="-mavx2 -mf16c -mno-fma";; \
	  esac; \
	  $(CXX) -std=c++17 -O1 -g -fsanitize=thread -fno-math-errno -ffp-contract=off -Wall -Wextra -Wno-psabi -pthread \
	    -Icsrc $$avx2 $$flags -c $$source -o build/tsan/$$(basename $$source .cpp).o; \
	  objects="$$objects build/tsan/$$(basename $$source .cpp).o"; \
	done; \
	$(CXX) -fsanitize=thread -pthread $$objects -lrt -o build/tsan/host_stress
	TSAN_OPTIONS="halt_on_error=1 second_deadlock_stack=1" build/tsan/host_stress $(ARGS)
endif

# The AVX2 file is part of the build on x86-64 only, as in setup.py.
AVX2 := $(if $(filter x86_64 amd64,$(shell uname -m)),$(if $(wildcard csrc/host/kernels_avx2.cpp),-DMOE_EP_HAVE_AVX2=1))

# Without READY the next target builds again, into the environment that is there.
clean:  ## Remove what builds and tests made; the virtual environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f moe_ep_plugin/*.so moe_ep_plugin/_build_info.json $(READY)
