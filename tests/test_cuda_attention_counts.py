"""The traffic and the tensor-core work of attention's CUDA kernels, on the virtual A100, and the
machine code of the backward's."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

import sass
from test_cuda_attention_bwd import backward, inputs

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks.attention_counts import PARTS, H, T, launches, seen_mmas, traffic  # noqa: E402


def named(log, text):
    return next(launch for launch in log if text in launch["kernel"])


@pytest.mark.parametrize("part, D", [(part, D) for D in (64, 128) for part in PARTS[D]],
                         ids=lambda x: getattr(x, "name", str(x)))
def test_traffic_and_tensor_work_against_the_ideal(vgpu, summary, part, D):
    """Each warp leaves out what its 16 or 32 x 64 or 32 x 16 block does not see: what is beyond the
    causal minimum lies on the diagonal."""
    found, launch = traffic(part, D), launches(D)[part.kernel]
    shared = launch["shared_wavefronts"] / (2 * launch["tensor"])
    summary.append(
        f"attention {part.name}, 1 x {T}, {H} heads, d{D}, bf16 causal, over the ideal: "
        f"tensor-core work {found['tensor work']:.3f} of {part.products} products, shared wavefronts "
        f"{found['wavefronts']:.4f}, sectors {found['sectors']:.3f}, bytes {found['bytes']:.3f}; "
        f"all wavefronts' time over the tensor cores' {shared:.2f}; instructions per mma "
        f"{found['instructions']:.2f}")
    width = {"forward": part.columns - 17, "backward dk, dv": part.rows // 4,
             "backward dq": 32}[part.name]
    diagonal = H * T * (width + 16) / 2 * D / (16 * 8 * 16)
    assert found["tensor work"] <= 1 + diagonal / seen_mmas(D)
    assert found["wavefronts"] <= 1.02 and found["sectors"] <= 1.02 and found["bytes"] <= 1.01
    assert shared <= 0.85


def test_tiles_that_nobody_sees_are_not_touched(vgpu):
    """A short window over many tokens: the work grows with the window, not with T squared."""
    T, D = 4096, 64
    q, k, v = inputs(1, T, T, 1, 1, D, torch.bfloat16)
    backward(q, k, v, q, q, torch.zeros(1, 1, T), window=64)
    log = vgpu.take_log()
    for name, products in (("dkdv", 4), ("dq", 3)):
        work = named(log, f"attention_bwd_{name}")["tensor"] / products
        assert work <= T * (64 + 2 * 64) * D / 2048
    k[:, :T // 2 - 300] = v[:, :T // 2 - 300] = math.nan  # hidden from the second half
    dq, _, _ = backward(q[:, T // 2:], k, v, q[:, T // 2:], q[:, T // 2:],
                        torch.zeros(1, 1, T // 2), window=64)
    assert dq.isfinite().all()


# Of FlashAttention-2's backward on sm_80, compiled with nvcc 13.0.88: instructions per HMMA, shared
# memory's time over the tensor cores'. And what ours may have.
FLASH_ATTENTION_2 = {128: (3.05, 0.95), 64: (4.01, 1.00)}
LIMITS = {128: (2.8, 0.8), 64: (3.6, 0.8)}


def test_machine_code(vgpu, summary):
    objects = {name: vgpu.kernel_object(vgpu.CSRC / "cuda" / f"attention_bwd{name}.cu")
               for name in ("", "_scalar", "_dkdv", "_dq")}
    found = {name: use for path in objects.values() for name, use in sass.resources(path).items()}
    assert len(found) == 8 + 8 + 6 + 6
    assert not [name for name, use in found.items() if use["stack"]]
    totals = {}
    for part, products in (("_dkdv", 4), ("_dq", 3)):
        for name, code in sass.kernels(objects[part]).items():
            D = int(re.search(r"Li(\d+)E", name)[1])
            if D == 256:
                continue
            loop = sass.hot_loop(code)
            assert loop["local"] == 0 and loop["per HMMA"] <= LIMITS[D][0], name
            assert loop["shared time"] <= LIMITS[D][1], name
            if "bfloat16" in name:
                totals[part, D] = loop["per HMMA"]
                summary.append(
                    f"attention backward{part} d{D} for sm_80, hot loop: {loop['HMMA']:.0f} HMMA, "
                    f"{loop['per HMMA']:.2f} instructions each (FlashAttention-2 "
                    f"{FLASH_ATTENTION_2[D][0]}); shared memory's time over the tensor cores' "
                    f"{loop['shared time']:.2f} ({FLASH_ATTENTION_2[D][1]}); "
                    f"{found[name]['registers']} registers, no spill")
    for D, (flash, _) in FLASH_ATTENTION_2.items():
        ours = 4 * totals["_dkdv", D] + 3 * totals["_dq", D]
        summary.append(f"attention backward d{D}: {ours:.1f} instructions per HMMA of one product, "
                       f"for all seven; FlashAttention-2 {5 * flash:.1f} for its five")
