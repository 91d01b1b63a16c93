"""The traffic, the tensor-core work and the machine code of the CUDA kernels of attention's
backward, on the virtual A100."""

import math
import re

import pytest
import torch

import sass
from test_cuda_attention_bwd import backward, inputs


def named(log, text):
    return next(launch for launch in log if text in launch["kernel"])


@pytest.mark.parametrize("D", [64, 128])
def test_traffic_and_tensor_work_against_the_ideal(vgpu, summary, D):
    B, T, H, Hkv = 1, 2048, 2, 1
    q, k, v = inputs(B, T, T, H, Hkv, D, torch.bfloat16)
    dout, o, lse = torch.zeros_like(q), torch.zeros_like(q), torch.zeros(B, H, T)
    backward(q, k, v, dout, o, lse)
    log = vgpu.take_log()
    assert len(log) == 3
    rows, keys = q.numel() * 2, k.numel() * 2  # bytes of one tensor
    statistics = B * H * T * 4
    ideal = {"delta": 2 * rows + statistics, "dkdv": 2 * rows + 4 * keys + 2 * statistics,
             "dq": 3 * rows + 2 * keys + 2 * statistics}
    # mma's of one product, of what is seen and of half a diagonal of blocks: each warp leaves out
    # what its 16 or 32 x 64 or 32 x 16 block does not see.
    product = B * H * T * (T + 1) / 2 * D / (16 * 8 * 16)
    for name, products, width in (("dkdv", 4, 64 if D == 64 else 32), ("dq", 3, 32)):
        launch = named(log, f"attention_bwd_{name}")
        work = launch["tensor"] / products
        wavefronts = launch["shared_wavefronts"] / launch["shared_wavefronts_ideal"]
        sectors = ((launch["global_load_sectors"] + launch["global_store_sectors"])
                   / (launch["global_load_sectors_ideal"] + launch["global_store_sectors_ideal"]))
        moved = (launch["global_unique_bytes_read"]
                 + launch["global_unique_bytes_written"]) / ideal[name]
        shared = launch["shared_wavefronts"] / (2 * launch["tensor"])
        summary.append(
            f"attention backward {name}, {B} x {T}, {H} heads, d{D}, bf16 causal, over the ideal: "
            f"tensor-core work {work / product:.3f} of {products} products, shared wavefronts "
            f"{wavefronts:.4f}, sectors {sectors:.3f}, bytes {moved:.3f}; all wavefronts' time "
            f"over the tensor cores' {shared:.2f}; instructions per mma "
            f"{launch['warp_instructions'] / launch['tensor']:.2f}")
        diagonal = B * H * T * (width + 16) / 2 * D / (16 * 8 * 16)
        assert work <= product + diagonal
        assert wavefronts <= 1.02 and sectors <= 1.02 and moved <= 1.01 and shared <= 0.85


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


def arms(code, begin, end):
    """The two sides of a branch in a loop that both come together again, as index ranges: what the
    one and the other warp of a pair does."""
    at = {address: i for i, (address, *_) in enumerate(code)}
    for i in range(begin, end):
        other = at.get(code[i][2], -1)
        if i < other <= end and code[other - 1][1] == "BRA" and at[code[other - 1][2]] > other:
            return range(i + 1, other), range(other, at[code[other - 1][2]])
    return None


def per_warp(code):
    """The counts of the hot loop, averaged over the two warps of a pair where these differ."""
    loops = [span for span in sass.innermost_loops(code) if sass.count(code, *span)["HMMA"]]
    begin, end = min(loops, key=lambda span: sass.count(code, *span)["per HMMA"])
    both = arms(code, begin, end) or (range(0), range(0))
    def without(arm):
        kept = [(*code[i][:2], None) for i in range(begin, end + 1) if i not in arm]
        return sass.count(kept, 0, len(kept) - 1)
    counts = [without(arm) for arm in both]
    return {key: sum(c[key] for c in counts) / 2 for key in ("HMMA", "per HMMA", "shared time",
                                                             "local")}


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
            loop = per_warp(code)
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
