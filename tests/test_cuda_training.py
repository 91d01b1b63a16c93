"""A tiny Llama trains on the CUDA kernels; its losses are those of the CPU's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compare
import tiny_training


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
