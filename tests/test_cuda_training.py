"""A tiny Llama on the CUDA kernels: it trains with the losses of the CPU's, and generates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import llama_ext as lx
import tiny_training
from llama_ext.generate import generate


def on_the_cpu(*arguments):
    """Losses of a run on the CPU's kernels, in a process of its own."""
    names = [str(argument).removeprefix("torch.") for argument in arguments]
    environment = {k: v for k, v in os.environ.items() if k != "LLAMA_EXT_CPU_TENSORS_TO"}
    paths = [str(Path(tiny_training.__file__).parent.parent), environment.get("PYTHONPATH", "")]
    done = subprocess.run([sys.executable, tiny_training.__file__, *names], capture_output=True,
                          text=True, env=environment | {"PYTHONPATH": os.pathsep.join(paths)})
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout), dtype=torch.float64)


@pytest.mark.parametrize("attention", ["torch", "ours"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_those_of_the_cpu(pytestconfig, dtype, attention):
    if pytestconfig.getoption("backend") == "cpu":
        pytest.skip("compares another backend with this one")
    got = torch.tensor(tiny_training.losses(dtype, dtype, attention), dtype=torch.float64)
    base = on_the_cpu(dtype, dtype, attention)
    true = on_the_cpu(dtype, torch.float64, attention)
    assert true[-1] < true[0]
    compare.check(got, true, base, dtype, "losses")


def test_generation_takes_the_kernels_for_few_queries(vgpu):
    """Token by token behind a cache, with the tokens that one pass over all of them finds best."""
    torch.manual_seed(0)
    model = lx.Llama(lx.LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97,
                                    multiple_of=32, max_seq_len=48)).bfloat16()
    prompt = list(range(30))
    new = generate(model, prompt, 6, temperature=0)
    kernels = [launch["kernel"] for launch in vgpu.take_log()]
    assert sum("decode_kernel" in kernel for kernel in kernels) == 2 * 5  # layers x later tokens
    with torch.no_grad():
        logits = model(torch.tensor([prompt + new[:-1]]))
    assert logits[0, len(prompt) - 1:].argmax(-1).tolist() == new
