# Every target installs what it needs into .venv; VENV=path uses another environment (a preinstalled torch stays).
VENV ?= .venv
PYTHON ?= python3
OUT ?= runs/quickstart
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1

.PHONY: setup quickstart test kernels-test kernels-check slow page docs oldest newest vllm gpu wheel real real-test ci clean

# The file .recurrent-depth-EXTRA in the environment says that this extra of pyproject.toml is installed.
setup: $(VENV)/.recurrent-depth-dev

$(VENV)/.recurrent-depth-%: pyproject.toml constraints.txt
	@echo "installing recurrent-depth[$*] into $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[$*]"
	touch $@

quickstart: $(VENV)/.recurrent-depth-quickstart
	$(BIN)/recurrent-depth quickstart --out $(OUT)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m "not slow and not gpu and not real and not page and not vllm"

# Every kernel in Triton's interpreter, which needs a separate process.
kernels-test: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/kernels -m "not gpu"

slow: setup
	$(BIN)/pytest -n 2 -m "slow and not gpu and not real and not page and not vllm"

# Every kernel compiled for every GPU, without one; then the check itself, on a tile that must fail.
kernels-check: setup
	$(BIN)/python scripts/check_kernels.py
	! $(BIN)/python scripts/check_kernels.py --planted --arch sm_80 gfx942

# The page of `analyze` in a headless Chromium; skipped without it: apt-get install chromium chromium-driver
page: setup
	$(BIN)/pytest -m page -rs tests/analysis

# The documentation as a site in build/site, which opens from disk. Warnings, such as broken links, are errors.
docs: $(VENV)/.recurrent-depth-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "build/site/index.html"

wheel: setup
	bash scripts/check_wheel.sh $(BIN)/python

# The oldest versions that are supported, and the newest that can be had; each in a separate environment.
oldest:
	bash scripts/test_versions.sh oldest torch==2.11.0 triton==3.6.0 transformers==5.4.0 "numpy<2.4"

newest:
	bash scripts/test_versions.sh newest --upgrade torch transformers

# The vLLM plugin and `serve --engine vllm`, with vLLM for CPUs in a separate environment.
vllm:
	bash scripts/test_vllm.sh

# Everything on one GPU (docs/gpu.md), MINUTES at a time; results in OUT_GPU. Without a GPU: all of it at toy size.
MINUTES ?= 9
OUT_GPU ?= gpu-results
gpu: setup
	$(BIN)/python -m benchmarks gpu --minutes $(MINUTES) --out $(OUT_GPU)

# A real model, evaluation data and text (docs/real.md) into build/real. What cannot be had is reported as SKIPPED.
# GSM8K=FOLDER takes its train and test rows from there.
GSM8K ?= $(wildcard ../shared/data/gsm8k)
real: setup
	$(BIN)/python scripts/fetch_real.py $(if $(GSM8K),--gsm8k $(GSM8K))

real-test: real
	$(BIN)/pytest -n 2 -m "real and not gpu"

ci: test kernels-test kernels-check slow page docs oldest newest vllm wheel real-test

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
