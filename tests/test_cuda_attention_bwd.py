"""What is particular to the CUDA kernels of attention's backward: every way they take through
tiles and options, called directly, with o and lse from the formula."""

import pytest
import torch

import compare
import llama_ext as lx
from harness import DTYPES, LAYOUTS, randn, shifted

pytestmark = pytest.mark.usefixtures("cuda_kernels")

HALF = [torch.bfloat16, torch.float16]
MASKS = {"causal": {}, "full": {"causal": False}, "causal window": {"window": 70},
         "full window": {"window": 21, "causal": False}}
every_mask = pytest.mark.parametrize("mask", MASKS)


def inputs(B, T, S, H, Hkv, D, dtype, **kwargs):
    return [randn(B, n, h, D, dtype=dtype, **kwargs) for n, h in ((T, H), (S, Hkv), (S, Hkv))]


def acc(dtype):
    return torch.promote_types(dtype, torch.float32)


def like_lse(q):
    heads = q.shape[-2]
    shape = (heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, q.shape[1])
    return randn(*shape, dtype=acc(q.dtype))


def reference(q, k, v, dout, dlse, options):
    """o, lse and the gradients of q, k, v by PyTorch, in the precision of q."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o, lse = lx.ref.attention(q, k, v, return_lse=True, **options)
    wanted = [(o, dout), (lse, dlse)][:1 if dlse is None else 2]
    grads = torch.autograd.grad([o for o, _ in wanted], (q, k, v),
                                [g.to(o.dtype) for o, g in wanted])
    return o.detach(), lse.detach(), grads


def definition(q, k, v, dout, o, lse, dlse=None, *, scale=None, causal=True, window=None,
               cu_seqlens=None):
    """The gradients in fp64 as api.h has them, from the o and lse that the kernels get: delta knows
    o only as it was rounded."""
    q, k, v, dout, o, lse = (t.double() for t in (q, k, v, dout, o, lse))
    dlse = torch.zeros_like(lse) if dlse is None else dlse.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if cu_seqlens is not None:
        spans = [[slice(*c[i:i + 2].tolist()) for c in cu_seqlens]
                 for i in range(len(cu_seqlens[0]) - 1)]
        parts = [definition(q[None, a], k[None, b], v[None, b], dout[None, a], o[None, a],
                            lse[None, :, a], dlse[None, :, a], scale=scale, causal=causal,
                            window=window) for a, b in spans]
        return [torch.cat([part[i][0] for part in parts]) for i in range(3)]
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    kh, vh = (t.repeat_interleave(H // Hkv, 2) for t in (k, v))
    hidden = ~lx.ref.attention_mask(T, S, causal, window)
    scores = scale * torch.einsum("bthd,bshd->bhts", q, kh)
    p = torch.exp(scores - lse[..., None]).masked_fill(hidden, 0)
    delta = torch.einsum("bthd,bthd->bht", dout, o) - dlse
    ds = p * (torch.einsum("bthd,bshd->bhts", dout, vh) - delta[..., None])
    dk, dv = (torch.einsum("bhts,bthd->bshd", w, x).reshape(B, S, Hkv, H // Hkv, D).sum(3)
              for w, x in ((scale * ds, q), (p, dout)))
    return [scale * torch.einsum("bhts,bshd->bthd", ds, kh), dk, dv]


def backward(q, k, v, dout, o, lse, dlse=None, *, scale=None, causal=True, window=None,
             cu_seqlens=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.llama_ext.attention_bwd(dout, dlse, q, k, v, o, lse, scale, causal,
                                             window or 0, *(cu_seqlens or (None, None)))


def check(q, k, v, *, dlse=False, dout_layout=lambda t: t, **options):
    """The gradients by compare.py's rule. A score s is off by about |s| roundings, and so,
    relatively, is its weight in fp32."""
    dout = dout_layout(randn(*q.shape, dtype=q.dtype))
    dlse = like_lse(q) if dlse else None
    o, lse, _ = reference(*(t.double() for t in (q, k, v, dout)), None, options)
    o, lse = o.to(q.dtype), lse.to(acc(q.dtype))
    base = reference(q, k, v, dout, dlse, options)[2]
    true = definition(q, k, v, dout, o, lse, dlse, **options)
    got = backward(q, k, v, dout, o, lse, dlse, **options)
    longest = [t.double().norm(dim=-1).max().item() for t in (q, k)]
    score = longest[0] * longest[1] * abs(options.get("scale") or q.shape[-1] ** -0.5)
    for name, g, t, b in zip(("dq", "dk", "dv"), got, true, base):
        compare.check(g, t, b, q.dtype, name, 3 + score)
    return got


@pytest.mark.parametrize("options", [{}, {"window": 5, "causal": False},
                                     {"cu_seqlens": (torch.tensor([0, 3, 9]),) * 2}], ids=str)
def test_the_definition_is_the_gradient(options):
    shape = (9,) if "cu_seqlens" in options else (2, 9)
    q, k, v, dout = (torch.randn(*shape, h, 8, dtype=torch.float64) for h in (4, 2, 2, 4))
    dlse = like_lse(q)
    o, lse, grads = reference(q, k, v, dout, dlse, options)
    for got, true in zip(definition(q, k, v, dout, o, lse, dlse, **options), grads):
        compare.check(got, true)


SIZES = [1, 17, 63, 64, 65, 127, 129, 200, 257]


@every_mask
@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("D", [64, 128])
def test_sizes(D, T, mask):
    """Every T with a third of the sizes as S, every S with some mask; both dtypes, GQA, MQA and
    single heads, one and two batches in turn."""
    first = (SIZES.index(T) + list(MASKS).index(mask)) % 3
    for i, S in enumerate(SIZES[first::3]):
        H, Hkv = ((2, 1), (1, 1), (3, 1), (4, 2))[(T + i) % 4]
        # One key has the weight 1 whatever its score: without dlse only rounding is left.
        # And few weights are few roundings, that may lean one way: more heads and batches.
        B = 1 + (T + S) % 2
        if min(T, S) == 1:
            B, H, Hkv = 48, 8, 4
        check(*inputs(B, T, S, H, Hkv, D, HALF[(T + S + D // 64) % 2]), dlse=S == 1 or i == 0,
              **MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_mask
@pytest.mark.parametrize("T, S", [(1, 1), (1, 257), (17, 64), (63, 65), (64, 127), (65, 63),
                                  (127, 129), (129, 17), (200, 200), (257, 1)])
def test_sizes_of_plain_arithmetic(T, S, mask, dtype):
    check(*inputs(1 + S % 2, T, S, 2, 1 + T % 2, 24, dtype), dlse=True, **MASKS[mask])


@pytest.mark.parametrize("D", [1, 7, 8, 40, 56, 72, 120, 136, 192, 200, 256, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(D, dtype):
    """Whole and padded tiles, odd rows of 16-bit values, several blocks of columns."""
    for mask in MASKS if dtype in HALF and D % 8 == 0 else ["causal"]:
        check(*inputs(1, 70, 133, 2, 1, D, dtype), dlse=True, **MASKS[mask])


@pytest.mark.parametrize("window", [1, 15, 16, 64, 65, 72, 74, 127, 128, 129, 1000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("D, T, S", [(64, 300, 290), (128, 140, 260)])
def test_windows_around_the_tiles(window, causal, D, T, S):
    check(*inputs(1, T, S, 1, 1, D, torch.bfloat16), dlse=True, window=window, causal=causal)


LENGTHS = {"one": ([70], [70]), "ragged": ([3, 260, 1, 129], [3, 260, 1, 129]),
           "empty sequences": ([0, 5, 0, 64, 0, 128, 0], [0, 5, 0, 64, 0, 128, 0]),
           "queries without keys": ([7, 80, 3], [4, 0, 9]),
           "keys without queries": ([1, 0, 66, 0], [40, 130, 8, 300])}


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.float16, 128),
                                      (torch.float32, 24)])
@every_mask
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(lengths, mask, dtype, D):
    T, S = LENGTHS[lengths]
    cu = tuple(torch.tensor([0, *n]).cumsum(0).int() for n in (T, S))
    q, k, v = (randn(sum(n), h, D, dtype=dtype) for n, h in ((T, 2), (S, 1), (S, 1)))
    check(q, k, v, dlse=True, cu_seqlens=cu, **MASKS[mask])


def test_many_packed_sequences():
    lengths = torch.arange(70) * 7 % 23
    cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    check(*(randn(int(cu[-1]), 2, 64, dtype=torch.bfloat16) for _ in range(3)), dlse=True,
          cu_seqlens=(cu, cu))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_equals_batched_bit_for_bit(dtype):
    q, k, v = inputs(3, 140, 140, 4, 2, 64, dtype)
    dout = randn(*q.shape, dtype=dtype)
    o, lse = lx.ref.attention(q, k, v, return_lse=True)
    batched = backward(q, k, v, dout, o, lse)
    cu = torch.arange(0, 421, 140, dtype=torch.int32)
    packed = backward(*(t.flatten(0, 1) for t in (q, k, v, dout, o)),
                      lse.transpose(0, 1).flatten(1).contiguous(), cu_seqlens=(cu, cu))
    for a, b in zip(packed, batched):
        assert torch.equal(a, b.flatten(0, 1))


@pytest.mark.parametrize("B, H, Hkv", [(5, 1, 1), (1, 8, 1), (2, 12, 4), (40, 2, 2), (1, 90, 90)])
@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.bfloat16, 128),
                                      (torch.float32, 16)])
def test_heads_and_batches(B, H, Hkv, dtype, D):
    T = 30 if B * H > 50 else 200
    check(*inputs(B, T, T + 20, H, Hkv, D, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    for D in (64, 24):
        q, k, v = (LAYOUTS[layout](t) for t in inputs(2, 70, 90, 4, 2, D, dtype))
        check(q, k, v, dout_layout=LAYOUTS[layout])


def padded(x):
    """x with the same values in rows of a wider buffer that are aligned to 16 bytes."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 16), float("nan"), dtype=x.dtype)
    wide[..., 8:8 + x.shape[-1]] = x
    return wide[..., 8:8 + x.shape[-1]]


def tail(x):
    """x with the same values at the very end of its memory."""
    wide = torch.full((x.shape[0] + 1, *x.shape[1:]), float("nan"), dtype=x.dtype)
    wide[1:] = x
    return wide[1:]


@pytest.mark.parametrize("T, S", [(70, 6000), (6000, 70)])
def test_heads_that_do_not_fit_the_cache_together(T, S):
    """Blocks of some heads go before those of others; the last of these are fewer."""
    check(*inputs(1, T, S, 4, 4, 256, torch.bfloat16), causal=False, window=50)


def in_aligned_rows(x):
    """x with the same values in rows of a wider buffer that all begin at multiples of 128 bytes."""
    return torch.full((*x.shape[:-1], 64), float("nan"), dtype=x.dtype)[..., :x.shape[-1]].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [7, 52, 61])
def test_odd_head_dims_in_aligned_rows(D, dtype):
    q, k, v = (in_aligned_rows(t) for t in inputs(2, 70, 90, 2, 1, D, dtype))
    check(q, k, v, dout_layout=in_aligned_rows)


@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("layout", [padded, shifted, tail])
@pytest.mark.parametrize("D", [40, 64, 128])
def test_one_operand_elsewhere(which, layout, D):
    operands = dict(zip("qkv", inputs(2, 70, 90, 2, 1, D, torch.bfloat16)))
    if which == "dout":
        check(*operands.values(), dout_layout=layout)
    else:
        operands[which] = layout(operands[which])
        check(*operands.values())


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.float16, 128),
                                      (torch.float32, 24), (torch.float64, 8)])
@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 0.0])
def test_scale(scale, dtype, D):
    q, k, v = inputs(1, 90, 90, 2, 2, D, dtype, scale=0.5)
    check(q, k, v, dlse=True, scale=scale, **({"causal": False} if scale == 0.01 else {}))


@pytest.mark.parametrize("D, dtype", [(64, torch.bfloat16), (128, torch.float16)])
@every_mask
def test_very_negative_lse_around_the_tiles(mask, D, dtype):
    """exp of anything but a difference overflows; of rows beyond the end too."""
    for T in (61, 66, 129):
        q, k = randn(1, T, 2, D, dtype=dtype, mean=3), -randn(1, T, 2, D, dtype=dtype, mean=3)
        assert lx.ref.attention(q, k, k, return_lse=True, **MASKS[mask])[1].max() < -30
        check(q, k, randn(1, T, 2, D, dtype=dtype), **MASKS[mask])


@every_mask
def test_very_negative_lse_of_plain_arithmetic(mask):
    """exp(-lse) is infinite, and so would be the weight of a key beyond the end, whose score is 0."""
    for T in (61, 66):
        q, k = (13 + randn(1, T, 2, 24, dtype=torch.float64, mean=0, scale=0.1) for _ in range(2))
        assert lx.ref.attention(q, -k, k, return_lse=True, **MASKS[mask])[1].max() < -710
        check(q, -k, randn(1, T, 2, 24, dtype=torch.float64), **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_nothing(dtype):
    for D in (64, 128, 8):
        q, k, v = inputs(2, 150, 20, 2, 1, D, dtype)
        dq, _, _ = check(q, k, v, dlse=True)
        assert (dq[:, :130] == 0).all() and (dq[:, 131:] != 0).any()


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.float16, 128),
                                      (torch.bfloat16, 256), (torch.float32, 40)])
def test_the_same_bits_every_time(dtype, D):
    """Twins in one batch run in other blocks, in another order of warps; so do repetitions."""
    q, k, v = inputs(1, 140, 140, 4, 2, D, dtype)
    dout = randn(*q.shape, dtype=dtype)
    o, lse, _ = reference(q, k, v, dout, None, {})
    tensors = [torch.cat((t,) * 3) for t in (q, k, v, dout, o, lse)]
    first = backward(*tensors)
    for _ in range(3):
        for a, b in zip(first, backward(*tensors)):
            assert torch.equal(a, b)
    for a in first:
        assert torch.equal(a, a[:1].expand_as(a))


@pytest.mark.parametrize("D", [64, 128])
def test_more_than_65536_tokens(D):
    """The gradients of the last queries, through a window, against the formula on the end alone."""
    T, end, window = 65536 + 77, 400, 150
    q, k, v = inputs(1, T, T, 1, 1, D, torch.bfloat16)
    dout = torch.zeros_like(q)
    dout[:, -100:] = randn(1, 100, 1, D, dtype=q.dtype)
    last = [t[:, -end:] for t in (q, k, v, dout)]
    o, lse, _ = reference(*(t.double() for t in last), None, {"window": window})
    o, lse = o.to(q.dtype), lse.float()
    true = definition(*last, o, lse, window=window)
    base = reference(*last, None, {"window": window})[2]
    whole_o, whole_lse = torch.zeros_like(q), torch.full((1, 1, T), 20.0)
    whole_o[:, -end:], whole_lse[..., -end:] = o, lse
    for got, t, b in zip(backward(q, k, v, dout, whole_o, whole_lse, window=window), true, base):
        assert (got[:, :-end] == 0).all()
        compare.check(got[:, -end:], t, b, q.dtype)


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 64), (torch.float32, 8)])
def test_rows_that_begin_beyond_2_to_the_31_elements(dtype, D):
    """Batches, or tokens, so far apart, in memory of which only touched pages exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    size = 2 ** 31 + 64
    for B, batch, token in ((2, size, D), (1, 0, size // 8)):
        def far(x):
            wide = torch.empty(size + 16 * D, dtype=dtype)
            return wide.as_strided((B, 9, 1, D), (batch, token, D, 1)).copy_(x)
        q, k, v = (far(t) for t in inputs(B, 9, 9, 1, 1, D, dtype))
        check(q, k, v, dlse=True, dout_layout=far)
