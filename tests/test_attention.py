import math

import pytest
import torch

import compare
import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn

MASKS = {"causal": {}, "full": {"causal": False}, "causal window": {"window": 9},
         "full window": {"window": 5, "causal": False}}
every_mask = pytest.mark.parametrize("mask", MASKS)

# B, T, S, H, Hkv, D
SHAPES = [(1, 1, 70, 2, 1, 8), (2, 7, 7, 2, 1, 16), (1, 130, 130, 2, 2, 64), (2, 65, 200, 4, 2, 40),
          (1, 200, 65, 2, 1, 33), (1, 300, 300, 1, 1, 128), (1, 2, 77, 3, 3, 24),
          (1, 5, 3, 1, 1, 1), (2, 64, 128, 1, 1, 192)]


def check(q, k, v, **kwargs):
    """A score s is off by about |s| roundings, and so, relatively, is its weight in fp32."""
    longest = [t.double().norm(dim=-1).max().item() if t.numel() else 0 for t in (q, k)]
    score = longest[0] * longest[1] * abs(kwargs.get("scale") or q.shape[-1] ** -0.5)
    check_op(lx.attention, lx.ref.attention, q, k, v, dtype=q.dtype, return_lse=True,
             fp32_roundings=3 + score, **kwargs)


def inputs(B, T, S, H, Hkv, D, dtype, **kwargs):
    return [randn(B, n, h, D, dtype=dtype, **kwargs) for n, h in ((T, H), (S, Hkv), (S, Hkv))]


@pytest.mark.parametrize("dtype", DTYPES)
@every_mask
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, shape, mask, dtype):
    check(*inputs(*shape, dtype), **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    q, k, v = (LAYOUTS[layout](t) for t in inputs(2, 70, 90, 4, 2, 24, dtype))
    check(q, k, v, cotangent_layout=LAYOUTS[layout])


def test_slices_of_a_fused_projection():
    qkv = randn(2, 70, 3, 2, 24)
    check(*qkv.unbind(2))
    check(*randn(2, 2, 70, 24 * 3).transpose(1, 2).split(24, -1))  # (B, H, T, D) in memory


@every_mask
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0, -0.3])
def test_scale(mask, dtype, scale):
    check(*inputs(1, 40, 40, 2, 2, 16, dtype), scale=scale, **MASKS[mask])


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_around_the_tile(window, causal):
    q, k, v = inputs(1, 150, 190, 1, 1, 16, torch.float64)
    check(q, k, v, window=window, causal=causal)


@pytest.mark.parametrize("T", range(60, 70))
@every_mask
def test_very_negative_lse_at_every_remainder(isa, T, mask):
    """Scores near -2000: exp() of anything but a difference of them underflows."""
    q = randn(2, T, 2, 16, mean=11)
    k = -randn(2, T, 2, 16, mean=11)
    v = randn(2, T, 2, 16)
    _, lse = lx.attention(q, k, v, return_lse=True, **MASKS[mask])
    assert lse.max() < -300
    check(q, k, v, **MASKS[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-3, 30])
def test_small_and_large_values(dtype, scale):
    check(*inputs(2, 100, 100, 2, 1, 32, dtype, scale=scale, mean=scale / 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_nothing(isa, dtype):
    q, k, v = (t.requires_grad_() for t in inputs(2, 90, 20, 2, 1, 16, dtype))
    o, lse = lx.attention(q, k, v, return_lse=True)
    (o.double().sum() + lse[..., 70:].double().sum()).backward()
    assert (o[:, :70] == 0).all() and (lse[..., :70] == -math.inf).all()
    assert (q.grad[:, :70] == 0).all() and (q.grad[:, 71:] != 0).any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_that_sees_one_key(dtype):
    """Its weight is 1 whatever the score: o is v, and only rounding gives q a gradient."""
    q, k, v = (t.requires_grad_() for t in inputs(2, 50, 1, 2, 2, 24, dtype, scale=2))
    o = lx.attention(q, k, v, causal=False)
    dout = randn(*o.shape, dtype=dtype)
    o.backward(dout)
    u = torch.finfo(dtype).eps / 2
    assert torch.equal(o, v.expand_as(o))
    compare.check(v.grad, dout.double().sum(1, True), dout.sum(1, True))
    assert q.grad.abs().max() < 8 * u * k.abs().max() * (dout.abs() * v.abs()).sum(-1).max()


LENGTHS = {"one": ([70], [70]), "ragged": ([3, 70, 1, 129], [3, 70, 1, 129]),
           "empty sequences": ([0, 5, 0, 64, 0], [0, 5, 0, 64, 0]),
           "more queries than keys": ([7, 80, 3], [4, 9, 0]),
           "fewer queries than keys": ([1, 66, 0], [40, 130, 8])}


@pytest.mark.parametrize("dtype", DTYPES)
@every_mask
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(lengths, mask, dtype):
    T, S = LENGTHS[lengths]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (T, S))
    q, k, v = (randn(sum(n), h, 24, dtype=dtype) for n, h in ((T, 4), (S, 2), (S, 2)))
    check(q, k, v, cu_seqlens=(cu_q, cu_k.int()), **MASKS[mask])
    if T == S:
        both = lx.attention(q, k, v, cu_seqlens=(cu_q, cu_k), **MASKS[mask])
        assert torch.equal(lx.attention(q, k, v, cu_seqlens=cu_q, **MASKS[mask]), both)


def test_packed_equals_batched_bit_for_bit():
    q, k, v = inputs(3, 100, 100, 4, 2, 16, torch.bfloat16)
    flat = lx.attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
                        cu_seqlens=torch.arange(0, 301, 100))
    assert torch.equal(flat.view_as(q), lx.attention(q, k, v))


@pytest.mark.parametrize("options", [{"window": 3}, {"causal": False}, {"scale": 0.7},
                                     {"cu_seqlens": torch.tensor([0, 2, 2, 7])}], ids=str)
def test_gradcheck_with_lse(options):
    q, k, v = (t.requires_grad_() for t in inputs(1, 7, 7, 4, 2, 6, torch.float64))
    if "cu_seqlens" in options:
        q, k, v = (t[0].detach().requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *a: lx.attention(*a, return_lse=True, **options),
                                    (q, k, v))


def test_gradient_of_lse_alone():
    q, k, v = (t.requires_grad_() for t in inputs(1, 7, 7, 2, 1, 6, torch.float64))
    lx.attention(q, k, v, return_lse=True)[1].sum().backward()
    got = q.grad, k.grad
    q.grad = k.grad = None
    lx.ref.attention(q, k, v, return_lse=True)[1].sum().backward()
    compare.check(got[0], q.grad)
    compare.check(got[1], k.grad)
    assert (v.grad == 0).all()


@pytest.mark.parametrize("B, T, S, H, Hkv", [(0, 5, 5, 2, 1), (2, 0, 5, 2, 1), (2, 5, 0, 2, 1),
                                             (2, 5, 5, 0, 0)])
def test_empty(B, T, S, H, Hkv):
    q, k, v = (t.requires_grad_() for t in inputs(B, T, S, H, Hkv, 8, torch.float32))
    o, lse = lx.attention(q, k, v, return_lse=True)
    o.sum().backward()
    assert o.shape == q.shape and lse.shape == (B, H, T)
    assert (o == 0).all() and all((t.grad == 0).all() for t in (q, k, v))


def test_nan_stays_where_it_is_seen():
    q, k, v = inputs(1, 100, 100, 1, 1, 16, torch.float32)
    k[0, 70, 0, 3] = math.nan
    o = lx.attention(q, k, v)
    assert o[0, :70].isfinite().all() and o[0, 70:].isnan().all()


def bad(sentence, q=(1, 5, 4, 8), k=(1, 5, 2, 8), v=None, dtypes=(torch.float32,) * 3, **kwargs):
    shapes = q, k, k if v is None else v
    return [torch.ones(s, dtype=d) for s, d in zip(shapes, dtypes)], kwargs, sentence


@pytest.mark.parametrize("args, kwargs, sentence", [
    bad(r"q: expected shape \(B, T, H, D\) without cu_seqlens, got \(5, 4, 8\)", q=(5, 4, 8)),
    bad(r"k: expected shape \(1, S, Hkv, 8\), got \(2, 5, 2, 8\)", k=(2, 5, 2, 8)),
    bad(r"k: expected shape \(1, S, Hkv, 8\), got \(1, 5, 2, 6\)", k=(1, 5, 2, 6)),
    bad("k: expected a number of heads that divides the 4 of q, got 3", k=(1, 5, 3, 8)),
    bad("k: expected a number of heads that divides the 4 of q, got 0", k=(1, 5, 0, 8)),
    bad(r"v: expected the shape of k, \(1, 5, 2, 8\), got \(1, 6, 2, 8\)", v=(1, 6, 2, 8)),
    bad("k: expected the dtype of q, float32, got float16",
        dtypes=(torch.float32, torch.float16, torch.float16)),
    bad("q: expected float32, bfloat16, float16 or float64, got int32",
        dtypes=(torch.int32,) * 3),
    bad("window: expected at least 1 or None, got 0", window=0),
    bad("cu_seqlens: expected an int32 or int64 tensor, or one for queries and one for keys, "
        "got [\\w, ]+", q=(5, 4, 8), k=(5, 2, 8), cu_seqlens=[[0, 5], [0, 5]]),
    bad("cu_seqlens: expected an int32 or int64 tensor, or one for queries and one for keys, "
        "got torch.float32, torch.float32", q=(5, 4, 8), k=(5, 2, 8),
        cu_seqlens=torch.tensor([0.0, 5.0])),
    bad("cu_seqlens: expected rising offsets, got 4 before 3", q=(5, 4, 8), k=(5, 2, 8),
        cu_seqlens=torch.tensor([0, 4, 3, 5])),
    bad("cu_seqlens: expected offsets from 0 to 5, the tokens, got 0 to 6", q=(5, 4, 8),
        k=(5, 2, 8), cu_seqlens=torch.tensor([0, 6])),
    bad("cu_seqlens: expected as many offsets of keys as of queries, 2, got 3", q=(5, 4, 8),
        k=(5, 2, 8), cu_seqlens=(torch.tensor([0, 5]), torch.tensor([0, 2, 5]))),
    bad(r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(0,\)", q=(5, 4, 8), k=(5, 2, 8),
        cu_seqlens=torch.tensor([], dtype=torch.int32)),
])
def test_bad_input_is_one_sentence(args, kwargs, sentence):
    with pytest.raises(RuntimeError, match=f"^attention: {sentence}$"):
        lx.attention(*args, **kwargs)
