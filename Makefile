# `make compare` and `make test` do all of their own set-up on a fresh machine: a virtual environment in .venv and this
# package in it, with the GPU extra where there is an NVIDIA GPU.
#
#   make compare                            TP against EP on what is here: on GPUs a real model's shape
#   make compare CHECKPOINT=dir LAYER=3     on your own model's layer
#   make compare ARGS="tokens=[8,512] iters=50"
#   make nightly                            the property tests with 2,000 examples each, and the slow tests
#   make docs                               docs/performance.md and docs/choosing.md from the recorded files
#   make report                             build/report.html from the recorded files
#   make test-browser                       the report's page in Chromium, which must be installed
#   make test-stacks                        models of transformers with our layers in them, which installs it
#   make test-faults                        hundreds of faults in ranks, and ten thousand steps, up to twenty minutes
#   make test-sglang, make test-vllm        our backends in their layers, without a GPU; downloads one of them
#   make kernels-check                      compile one of the cutlass backend's kernels, without a GPU
#   make PIP_ARGS="--extra-index-url URL" …  another package index, such as PyTorch's of CPU builds
#   make TORCH="torch==2.14.*" …            another release of torch

PYTHON ?= python3
VENV ?= .venv
LAYER ?= 0
ARGS ?=
PIP_ARGS ?=
# Of the releases that pyproject.toml admits. On a CPU 2.14 passes the same tests; GPUs have run 2.11.
TORCH ?= torch<2.14
OUT ?= results/compare.json
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
DEMO := .demo-checkpoint/tiny-moe
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: compare test nightly lint docs report test-browser test-stacks test-faults test-sglang test-vllm kernels-check gpu-test clean

compare: $(VENV)/.ready
ifneq ($(origin CHECKPOINT),undefined)  # given but empty, as from an unset variable, is refused by the command
	$(BIN)/moe-dist compare --checkpoint "$(CHECKPOINT)" --layer $(LAYER) --out "$(OUT)" $(ARGS)
else ifneq ($(GPU),)
	$(BIN)/moe-dist compare --out "$(OUT)" $(ARGS)
else
	$(BIN)/moe-dist demo-checkpoint $(DEMO)
	$(BIN)/moe-dist compare --checkpoint $(DEMO) --layer $(LAYER) --out "$(OUT)" $(ARGS)
endif

# Whole files to each of three processes: ranks and Ray clusters are shared within a file, and some wait for timeouts.
test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Property tests with 2,000 examples each, and what takes long and shows little more.
nightly: $(VENV)/.ready-test
	MOE_DIST_HYPOTHESIS=nightly $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "(hypothesis or slow) and not gpu" \
		--timeout 3600 $(ARGS)

# Not in CI, which has no GPU.
gpu-test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -m gpu tests/gpu $(ARGS)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror moe_dist/kernels/cutlass/*.cu moe_dist/kernels/cutlass/*.cuh

docs: $(VENV)/.ready
	$(BIN)/python benchmarks/make_tables.py
	$(BIN)/python benchmarks/make_choosing.py
	$(BIN)/python benchmarks/make_operations.py

# A file without rows of results is named and left out.
report: $(VENV)/.ready
	$(BIN)/moe-dist report $(wildcard benchmarks/*.json) --out build/report.html

test-browser: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -m browser tests/browser $(ARGS)

# Models of other libraries with our layers in them; small and random, so that nothing is downloaded.
test-stacks: $(VENV)/.ready-stacks
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "stacks and not gpu" tests/stacks $(ARGS)

# Ray and torchrun side by side: their ranks wait most of the time. What was measured is in build/faults;
# benchmarks/make_operations.py makes the record and the figures of docs/operations.md from it.
test-faults: $(VENV)/.ready-test
	MOE_DIST_FAULTS_OUT=build/faults $(BIN)/python -m pytest -q -n 2 --dist loadfile -m faults tests/faults $(ARGS)

# Each in an environment of its own: that of the tests, and the stack's package without the gigabytes that it depends on.
test-sglang test-vllm: test-%: build/%-env/.ready
	build/$*-env/bin/python -m pytest -q -m stacks tests/serving/test_$**.py $(ARGS)

# Compiler and headers come from packages, so that it needs no CUDA toolkit; what it compiled is kept. The package of
# CUTLASS's headers wants others for its Python part, which is not used.
kernels-check: $(VENV)/.ready-kernels
	CUDA_HOME="$$(echo $(VENV)/lib/python3*/site-packages/nvidia/cu13)" $(BIN)/python -m moe_dist.kernels.cutlass.check

clean:
	rm -rf $(VENV) $(dir $(DEMO))

# Editable installs: code changes need no new installation, changed dependencies do.
$(VENV)/.ready: pyproject.toml
	@echo "Installing into $(VENV) ($(if $(GPU),with the GPU extra,no NVIDIA GPU here: CPU only)); the first time takes minutes."
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) "$(TORCH)" -e ".$(if $(GPU),[gpu])"
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[$(if $(GPU),gpu$(COMMA))test]"
	@touch $@

$(VENV)/.ready-stacks: $(VENV)/.ready-test
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[$(if $(GPU),gpu$(COMMA))test,stacks]"
	@touch $@

build/%-env/.ready: tests/serving/%.txt $(VENV)/.ready-test
	$(BIN)/python -m venv --clear --without-pip build/$*-env
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo build/$*-env/lib/python3*/site-packages)/tests.pth"
	$(BIN)/python -m pip --python build/$*-env/bin/python install -q $(PIP_ARGS) --no-deps -r $< -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[dev]"
	@touch $@

$(VENV)/.ready-kernels: $(VENV)/.ready
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[kernels]"
	$(BIN)/python -m pip install -q $(PIP_ARGS) --no-deps "nvidia-cutlass>=4.2,<5"
	@touch $@

COMMA := ,
