"""The model of an A100 (benchmarks/a100) against what others measured, and its arithmetic."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import baseline  # noqa: E402
from benchmarks.a100 import model, report  # noqa: E402

A100 = model.GPUS["A100-80GB"]
KERNEL = model.Kernel(128, 64, 2, 3.0, 0.25, 0.5, 2)


@pytest.mark.parametrize("name, what, D, T, measured, modelled", report.check())
def test_published_times(name, what, D, T, measured, modelled):
    """Three numbers were fitted to twelve times of the A100; those of the H100 are predictions."""
    assert abs(modelled / measured - 1) < (0.05 if name.startswith("A100") else 0.08)


def test_tiles_of_a_causal_mask():
    forward = dataclasses.replace(KERNEL, heavy_first=False)
    assert model.causal_tiles(forward, 300) == [2, 4, 5]
    assert model.causal_tiles(KERNEL, 300) == [5, 4, 2]
    assert model.causal_tiles(dataclasses.replace(forward, of_keys=True), 300) == [5, 3, 1]


def test_no_kernel_beats_a_pipe():
    alone = dataclasses.replace(KERNEL, instructions=0, mufu=0, shared=0)
    assert model.clocks_per_hmma(A100, alone) == A100.hmma_clocks
    for change in ({"instructions": 9.0}, {"mufu": 2.0}, {"shared": 1.5}):
        slower = dataclasses.replace(alone, **change)
        assert model.clocks_per_hmma(A100, slower) > max(8, 8 * slower.mufu, 8 * slower.shared,
                                                         slower.instructions)


def test_time_of_many_heads_grows_with_the_work():
    """So many heads that no SM is idle: seconds are the work over what all SMs do."""
    T, D, heads = 1024, 128, 1080
    hmma = 2 * D / 2048 * sum(model.causal_tiles(KERNEL, T)) * 128 * 64
    work = heads * (hmma / 4 * model.clocks_per_hmma(A100, KERNEL)
                    + T / 128 * model.OVERHEAD / KERNEL.blocks)
    ideal = work / A100.sms / (A100.clock * model.CLOCK)
    assert ideal <= model.kernel_seconds(A100, KERNEL, T, D, heads) <= 1.02 * ideal


def test_the_work_is_what_the_virtual_a100_counts(vgpu):
    """HMMA of the model's tiles: as many as are issued, and what warps leave out on the diagonal."""
    from benchmarks import attention_counts as counts

    for D, parts in counts.PARTS.items():
        for part in parts:
            kernel = report.our_kernels(D, baseline.load()["attention"])[part.name]
            modelled = (counts.H * part.products * sum(model.causal_tiles(kernel, counts.T))
                        * part.rows * part.columns * D / 2048)
            issued = counts.launches(D)[part.kernel]["tensor"]
            assert issued <= modelled <= 1.15 * issued
