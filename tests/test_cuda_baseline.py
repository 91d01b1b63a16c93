"""The CUDA kernels' static figures are no worse than those in benchmarks/baseline.json."""

import copy
import sys
from pathlib import Path

import pytest

import sass

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import baseline  # noqa: E402

RENEW = "`python -m benchmarks counts --save` renews benchmarks/baseline.json"


@pytest.mark.parametrize("group", ["kernels", "ops", "attention", "launches"])
def test_nothing_is_worse_than_before(vgpu, group):
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump, on PATH or in the package triton")
    before = baseline.load()
    if before["nvcc"] != baseline.nvcc_version():
        pytest.skip(f"figures are those of nvcc {before['nvcc']}, not {baseline.nvcc_version()}")
    found = baseline.worse(before[group], getattr(baseline, group)())
    assert not found, "\n".join([*found, RENEW])


def test_what_is_worse():
    before = {"kernel": {"registers": 100, "in flight": 64.0, "spilled bytes": 0}, "gone": {}}
    now = copy.deepcopy(before)
    now["kernel"] |= {"registers": 102, "in flight": 63.0}
    assert baseline.worse(before, now) == []
    now["kernel"] |= {"registers": 103, "in flight": 62.0, "spilled bytes": 4}
    del now["gone"]
    assert baseline.worse(before, now) == [
        "gone: expected it in both, got it in one",
        "kernel: in flight: expected 64, got 62",
        "kernel: registers: expected 100, got 103",
        "kernel: spilled bytes: expected 0, got 4"]
