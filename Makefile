# Every target sets up what it needs (scripts/setup.sh); a second run does no work twice. `make help` lists them.
VENV := .venv
PY := $(VENV)/bin/python

# A prompt reaches the demo through the environment exactly as it was typed: neither make nor a shell expands it.
ifdef PROMPT
override PROMPT := $(value PROMPT)
export PROMPT
endif

# The architectures that `make compile` compiles for.
ARCHS ?= sm_80 sm_89 sm_90a sm_100

.DEFAULT_GOAL := help
.PHONY: help demo train-demo tutorial test test-gpu sanitize-gpu bench bench-gpu compile wheel docs lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: ## a real language model on heed's attention; make demo PROMPT="..."
	@scripts/setup.sh demo
	@$(PY) examples/demo.py

train-demo: ## fine-tune that model on heed and on plain attention; make train-demo TRAIN_ARGS="--steps 8"
	@scripts/setup.sh train-demo
	@$(PY) examples/train.py $(TRAIN_ARGS)

tutorial: ## heed's kernels inside JAX programs, step by step; make tutorial TUTORIAL_ARGS="--device cpu"
	@scripts/setup.sh tutorial
	@$(PY) examples/tutorial.py $(TUTORIAL_ARGS)

test: ## pytest and the C++ tests; make test PYTEST_ARGS="-k gqa"
	@scripts/setup.sh test
	@scripts/test.sh $(PY)

test-gpu: ## the tests that need an NVIDIA GPU; make test-gpu PYTEST_ARGS="-k stream"
	@scripts/setup.sh test-gpu
	@HEED_REQUIRE_GPU=1 HEED_SKIP_CTEST=1 PYTEST_ARGS="-m gpu $(PYTEST_ARGS)" scripts/test.sh $(PY)

sanitize-gpu: ## the GPU kernels under each tool of compute-sanitizer; make sanitize-gpu CASES=causal
	@scripts/setup.sh test-gpu
	@scripts/sanitize_gpu.sh $(PY) $(if $(CASES),--only $(CASES))

bench: ## measure heed against what else is installed; make bench BENCH_ARGS="..."
	@scripts/setup.sh bench
	@$(PY) bench/cpu_attention_fwd.py $(BENCH_ARGS)
	@$(PY) bench/cpu_attention_bwd.py $(BENCH_ARGS)
	@$(PY) bench/cpu_small_ops.py $(BENCH_ARGS)

bench-gpu: ## measure heed on an NVIDIA GPU against torch and JAX; make bench-gpu BENCH_ARGS="--quick"
	@scripts/setup.sh bench-gpu
	@$(PY) bench/gpu_attention_fwd.py $(BENCH_ARGS)
	@$(PY) bench/gpu_attention_bwd.py $(BENCH_ARGS)
	@$(PY) bench/gpu_small_ops.py $(BENCH_ARGS)

compile: ## compile all GPU kernels of the ahead-of-time list (needs NVRTC, no GPU); make compile ARCHS="sm_90a"
	@scripts/setup.sh compile
	@$(PY) -m heed compile --output build/kernels $(addprefix --arch=,$(ARCHS))

wheel: ## build the wheel into dist/
	@scripts/setup.sh wheel
	@ls -1 dist/heed-*.whl 2>/dev/null || scripts/build_wheel.sh $(PY)

docs: ## generate the documentation
	@scripts/setup.sh docs
	@$(PY) docs/build.py

lint: ## clang-format, ruff, mypy, clang-tidy
	@scripts/setup.sh lint
	@scripts/lint.sh $(VENV)

format: ## format C++ and Python in place
	@scripts/setup.sh lint
	@scripts/lint.sh $(VENV) format

clean: ## remove build trees and wheels (the environment in .venv stays)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.heed-setup/wheel
