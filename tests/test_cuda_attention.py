"""The CUDA forward of attention: ragged sizes, head dims, layouts, masks, packing, few queries
against many keys, values that rescale; its traffic, tensor-core work and machine code on the virtual
A100."""

import math

import pytest
import torch

import compare
import llama_ext as lx
import sass
from harness import DTYPES, randn, shifted

pytestmark = pytest.mark.usefixtures("cuda_kernels")

HALVES = [torch.bfloat16, torch.float16]
MASKS = {"causal": {}, "full": {"causal": False}, "causal window": {"window": 70},
         "full window": {"window": 33, "causal": False}}
SIZES = [1, 17, 63, 64, 65, 127, 129, 200, 257]


def inputs(B, T, S, H, Hkv, D, dtype, **kwargs):
    return [randn(B, n, h, D, dtype=dtype, **kwargs) for n, h in ((T, H), (S, Hkv), (S, Hkv))]


def check(q, k, v, **kwargs):
    """Output and lse against fp64. A score s is off by about |s| roundings in fp32."""
    longest = [t.double().norm(dim=-1).nan_to_num(0, 0, 0).max().item() if t.numel() else 0
               for t in (q, k)]
    score = longest[0] * longest[1] * abs(kwargs.get("scale") or q.shape[-1] ** -0.5)
    got = lx.attention(q, k, v, return_lse=True, **kwargs)
    base = lx.ref.attention(q, k, v, return_lse=True, **kwargs)
    true = lx.ref.attention(*(t.double() for t in (q, k, v)), return_lse=True, **kwargs)
    for name, g, t, b in zip(("o", "lse"), got, true, base):
        assert g.dtype == b.dtype
        compare.check(g, t, b, q.dtype, name, 3 + score)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [64, 128])
def test_ragged_sizes(D, mask, dtype):
    """Every size as T and as S, with both larger."""
    for i, T in enumerate(SIZES):
        check(*inputs(1, T, SIZES[i * 4 % len(SIZES)], 2, 1, D, dtype), **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 8, 33, 40, 72, 96, 100, 136, 192, 256, 320])
def test_head_dims(D, dtype):
    check(*inputs(2, 70, 90, 2, 2, D, dtype))
    check(*inputs(1, 5, 90, 2, 1, D, dtype), causal=False)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", MASKS)
def test_grouped_heads_and_batches(mask, dtype):
    check(*inputs(3, 150, 190, 6, 2, 64, dtype), **MASKS[mask])
    check(*inputs(2, 130, 40, 4, 1, 128, dtype), **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection(dtype):
    check(*randn(2, 140, 3, 2, 64, dtype=dtype).unbind(2))
    check(*randn(2, 2, 140, 64 * 3, dtype=dtype).transpose(1, 2).split(64, -1))
    q, k, v = inputs(2, 140, 140, 2, 2, 64, dtype)
    check(q, k[:1].expand_as(k), v[:, :, :1].expand_as(v))


@pytest.mark.parametrize("T", [3, 70])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("spoil", [shifted, lambda t: torch.nn.functional.pad(t, (0, 1))[..., :-1]],
                         ids=["misaligned", "odd stride"])
def test_operands_that_tensor_cores_cannot_load(spoil, which, T):
    args = inputs(2, T, 90, 2, 1, 64, torch.bfloat16)
    args[which] = spoil(args[which])
    check(*args)


PACKED = {"ragged": ([3, 200, 1, 129], [3, 200, 1, 129]),
          "empty sequences": ([0, 5, 0, 64, 0, 0], [0, 5, 0, 64, 0, 0]),
          "all sorts": ([7, 0, 180, 3, 128, 66], [4, 9, 90, 0, 300, 66]),
          "many short ones": ([2, 1, 5, 3] * 20, [3, 1, 0, 9] * 20)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", PACKED)
def test_packed(lengths, mask, dtype):
    T, S = PACKED[lengths]
    cu = tuple(torch.tensor([0, *n]).cumsum(0) for n in (T, S))
    q, k, v = (randn(sum(n), h, 64, dtype=dtype) for n, h in ((T, 4), (S, 2), (S, 2)))
    check(q, k, v, cu_seqlens=cu, **MASKS[mask])


@pytest.mark.parametrize("dtype", HALVES)
def test_packed_equals_batched_bit_for_bit(dtype):
    q, k, v = inputs(3, 100, 100, 4, 2, 128, dtype)
    flat = lx.attention(*(t.flatten(0, 1) for t in (q, k, v)),
                        cu_seqlens=torch.arange(0, 301, 100))
    assert torch.equal(flat.view_as(q), lx.attention(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, S", [(150, 20), (9, 5), (140, 0)])
def test_queries_that_see_nothing(T, S, dtype):
    o, lse = check(*inputs(2, T, S, 2, 1, 64, dtype))
    assert (o[:, :T - S] == 0).all() and (lse[..., :T - S] == -math.inf).all()
    assert lse[..., T - S:].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", [4, 200])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
def test_scale(scale, T, dtype):
    q, k, v = inputs(1, T, 200, 2, 2, 64, dtype)
    if scale:
        check(q, k, v, scale=scale)
    else:
        o = lx.attention(q, k, v, scale=0.0, causal=False)
        compare.check(o, v.double().mean(1, keepdim=True).expand_as(o),
                      v.mean(1, keepdim=True).expand_as(o))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [3, 300])
@pytest.mark.parametrize("growth", ["towards the first key", "towards the last", "in the middle"])
def test_scores_that_grow_along_the_keys(growth, T, dtype):
    """By hundreds, so that weights of tiles seen earlier have to shrink to nothing, or the later
    ones are nothing beside them."""
    S = 300
    at = torch.arange(S, dtype=torch.float64) / S
    rise = {"towards the first key": 1 - at, "towards the last": at,
            "in the middle": 1 - (2 * at - 1).abs()}[growth]
    q, k, v = inputs(1, T, S, 2, 2, 64, dtype)
    rows = (torch.arange(T) // 8 % 4 / 3).double()  # nothing grows for the first 8 of 32
    q = ((q.double() + 3) * rows[:, None, None]).to(dtype)
    k = (k.double() + 12 * rise[:, None, None]).to(dtype)
    for mask in MASKS.values():
        check(q, k, v, **mask)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("D, H, Hkv", [(64, 8, 1), (128, 4, 4), (128, 24, 2), (256, 3, 1),
                                       (80, 2, 2)])
def test_few_queries_against_a_long_cache(D, H, Hkv, dtype):
    """The cache is longer than what is seen, and not a number there."""
    for T, S in [(1, 1), (1, 700), (1, 3001), (2, 64), (5, 1030), (16, 517), (17, 517)]:
        q, k, v = inputs(2, T, S + 9, H, Hkv, D, dtype)
        k[:, S:] = v[:, S:] = math.nan
        for mask in MASKS.values():
            check(q, k[:, :S], v[:, :S], **mask)


def test_the_keys_of_few_queries_are_split(vgpu):
    q, k, v = inputs(1, 1, 6000, 32, 8, 128, torch.bfloat16)
    check(q, k, v)
    launches = [launch for launch in vgpu.take_log() if "attention" in launch["kernel"]]
    assert ["decode_kernel" in launch["kernel"] for launch in launches] == [True, False]
    assert launches[0]["grid"] == [8, 23, 1]  # key/value heads, parts
    ideal = sum(t.numel() * t.element_size() for t in (q, k, v))
    assert launches[0]["global_unique_bytes_read"] <= 1.01 * ideal
    assert launches[0]["global_load_bytes"] <= 1.01 * ideal


def test_heads_whose_keys_and_values_do_not_fit_the_cache_together():
    """Blocks of some heads go before those of others; the last of these are fewer."""
    check(*inputs(1, 40, 6000, 5, 5, 256, torch.bfloat16))
    check(*inputs(1, 40, 13000, 6, 3, 96, torch.float32), window=200)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", [3, 257])
def test_results_repeat_bit_for_bit(T, dtype):
    q, k, v = inputs(2, T, 700, 4, 2, 64, dtype)
    first = lx.attention(q, k, v, return_lse=True)
    for _ in range(4):
        again = lx.attention(q, k, v, return_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_more_than_65536_tokens(dtype):
    T, window = 65536 + 200, 30
    q, k, v = inputs(1, T, T, 1, 1, 8, dtype)
    o = lx.attention(q, k, v, window=window)
    tail = [t[:, n:] for t, n in ((q, T - 150), (k, T - 200), (v, T - 200))]
    compare.check(o[:, T - 150:], lx.ref.attention(*(t.double() for t in tail), window=window),
                  lx.ref.attention(*tail, window=window), dtype, fp32_roundings=30)


def test_more_than_65536_heads():
    check(*inputs(2, 1, 2, 65536 // 2 + 5, 65536 // 2 + 5, 8, torch.bfloat16))


def test_tokens_that_lie_beyond_2_to_the_31_elements():
    """K and V with rows so far apart that the last begins past 2^31."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    S, D = 70, 64
    gap = 2 ** 31 // (S - 1) // 8 * 8 + 64
    wide = torch.empty(S * gap, dtype=torch.bfloat16)
    for T in (3, 70):
        q, k, v = inputs(1, T, S, 1, 1, D, torch.bfloat16)
        apart = [wide[at:].as_strided(k.shape, (0, gap, D, 1)) for at in (0, D)]
        for to, values in zip(apart, (k, v)):
            to.copy_(values)
        check(q, *apart)


# Of FlashAttention-2's forward on sm_80, compiled with nvcc 13.0.88: instructions per HMMA, shared
# memory's time over the tensor cores'. And what ours may have.
FLASH_ATTENTION_2 = {128: (3.57, 0.62), 64: (4.56, 0.56)}
LIMITS = {128: (2.85, 0.60), 64: (3.65, 0.51)}


def test_machine_code(vgpu, summary):
    objects = [vgpu.kernel_object(vgpu.CSRC / "cuda" / f"attention_{name}.cu")
               for name in ("fwd", "decode", "scalar")]
    found = {name: use for path in objects for name, use in sass.resources(path).items()}
    assert len(found) == 6 + 6 + 2 + 4  # forward; decode, its merge; scalar
    assert not [name for name, use in found.items() if use["stack"]]
    for name, code in sass.kernels(objects[0]).items():
        loop = sass.hot_loop(code)
        D = next(d for d in (64, 128, 256) if f"Li{d}E" in name)
        assert loop["local"] == 0
        if D == 256:
            continue
        assert loop["per HMMA"] <= LIMITS[D][0] and loop["shared time"] <= LIMITS[D][1], name
        if "bfloat16" in name:
            summary.append(
                f"attention forward d{D} for sm_80, hot loop: {loop['HMMA']} HMMA, "
                f"{loop['per HMMA']:.2f} instructions each (FlashAttention-2 "
                f"{FLASH_ATTENTION_2[D][0]}); shared memory's time over the tensor cores' "
                f"{loop['shared time']:.2f} ({FLASH_ATTENTION_2[D][1]}); "
                f"{found[name]['registers']} registers, no spill; {loop['rare']} "
                "more instructions where a tile is redone")
