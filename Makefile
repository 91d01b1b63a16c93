# make demo   train a LLaMA of 10M parameters on the Python standard library's sources
# make test   run every test, and those of the CUDA kernels on the virtual A100
# make bench  time ops and models beside their peers, on the GPU where there is one
# make clean  remove what these made
#
# Each sets up all it needs in .venv. TORCH chooses another torch: make test TORCH=torch==2.14.1

PYTHON ?= python3
gpu := $(shell nvidia-smi -L 2>/dev/null)
TORCH ?= $(if $(gpu),torch,torch==2.13.0)
bin := .venv/bin
data := out/data
run := out/run
vgpu_tests := $(patsubst %,tests/test_%.py,rmsnorm swiglu rope attention attention_nonfinite \
  cross_entropy linear_cross_entropy linear_int8 contract registration layers \
  trained_activations) \
  $(wildcard tests/test_cuda_*)
two_processes := -n 2 --dist=worksteal
export PIP_DISABLE_PIP_VERSION_CHECK = 1

demo: $(bin)/built
	$(bin)/llama-ext prepare stdlib --out $(data)
	$(bin)/llama-ext train --data $(data) --run $(run) --preset tiny --seq-len 128 --batch-size 4 \
	  --lr 1.5e-3 --steps 2400 --val-every 400 --save-every 200 --log-every 100
	@echo 'a sample of what it writes:'
	@$(bin)/llama-ext generate --run $(run) --prompt 'def main(' --seed 1

test: $(bin)/built $(bin)/nvcc
	$(bin)/python -m pytest -q $(two_processes)
	$(bin)/python -m pytest -q $(two_processes) --backend=vgpu $(vgpu_tests)

ifdef gpu
# Twice: the first build may have come before the nvcc.
bench: $(bin)/built $(bin)/nvcc
	$(bin)/python setup.py -q build_ext --inplace
	@mkdir -p out/bench
	$(bin)/python -m benchmarks run --backend cuda --json out/bench/ops.json --plots out/bench/ops
	$(bin)/python -m benchmarks models --backend cuda --sizes 7B --layers 8 --batch 1 --tokens 2048 \
	  --prompt 512 --new 64 --dtypes bf16 --json out/bench/models.json --plots out/bench/models
else
bench: $(bin)/built $(bin)/nvcc
	@mkdir -p out/bench
	$(bin)/python -m benchmarks run --sizes small --json out/bench/ops.json --plots out/bench/ops
	$(bin)/python -m benchmarks models --batch 2 --json out/bench/models.json \
	  --plots out/bench/models
	$(bin)/python -m benchmarks run --backend vgpu --ops rmsnorm swiglu rope attention \
	  --json out/bench/vgpu.json --plots out/bench/vgpu
	$(bin)/python -m benchmarks a100
endif

clean:
	rm -rf .venv build out llama_ext.egg-info llama_ext/*.so

# The package itself, editable and built against the torch that is there.
$(bin)/built: $(bin)/torch pyproject.toml setup.py $(shell find csrc -type f)
	$(bin)/pip install -q --no-build-isolation -e '.[train,test]'
	@touch $@

# The CUDA compiler that the virtual A100's tests need: the machine's, else PyPI's.
$(bin)/nvcc: $(bin)/built
	@$(bin)/python csrc/cuda/nvcc.py || $(bin)/pip install -q --no-build-isolation -e '.[nvcc]'
	@touch $@

$(bin)/torch:
	@$(PYTHON) -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'make: expected Python 3.10 or newer with venv, got $(PYTHON)'; exit 1; }
	@command -v $(firstword $(CXX)) >/dev/null || \
	  { echo 'make: expected a C++20 compiler in CXX or on PATH, got $(CXX)'; exit 1; }
	$(PYTHON) -m venv .venv
	$(bin)/pip install -q '$(TORCH)' setuptools wheel
	@touch $@

.PHONY: demo test bench clean
