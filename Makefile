# Every target sets up what it needs (scripts/setup.sh); a second run does no work twice. `make help` lists them.
VENV := .venv
PY := $(VENV)/bin/python

# A prompt reaches the demo through the environment exactly as it was typed: neither make nor a shell expands it.
ifdef PROMPT
override PROMPT := $(value PROMPT)
export PROMPT
endif

.DEFAULT_GOAL := help
.PHONY: help demo test bench wheel docs lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: ## a real language model on heed's attention; make demo PROMPT="..."
	@scripts/setup.sh demo
	@$(PY) examples/demo.py

test: ## pytest and the C++ tests; make test PYTEST_ARGS="-k gqa"
	@scripts/setup.sh test
	@scripts/test.sh $(PY)

bench: ## measure heed against what else is installed; make bench BENCH_ARGS="..."
	@scripts/setup.sh bench
	@$(PY) bench/cpu_attention_fwd.py $(BENCH_ARGS)

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
