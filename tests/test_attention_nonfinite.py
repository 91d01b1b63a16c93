"""Attention where inputs are NaN or infinite: the results are so where the formula's are, and no
further."""

import math

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, randn
from test_cuda_attention import check as check_forward
from test_cuda_attention import inputs
from test_cuda_attention_bwd import backward, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 4, 150])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_keys(isa, value, T, dtype):
    """One component of a key: scores are NaN, inf or -inf where it is seen. And all keys -inf."""
    q, k, v = inputs(1, T, 150, 1, 1, 64, dtype)
    k[0, 90, 0, 3] = value
    check_forward(q, k, v)
    check_forward(q, k, v, causal=False)
    check_forward(q.abs(), torch.full_like(k, -math.inf), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 3, 98])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite(isa, bad, at, dtype):
    """All others keep their bits."""
    q, k, v = inputs(1, 150, 150, 1, 1, 64, dtype)
    clean, clean_lse = lx.attention(q, k, v, return_lse=True)
    q[0, at, 0, 3] = bad
    o, lse = lx.attention(q, k, v, return_lse=True)
    others = torch.arange(150) != at
    assert torch.equal(o[:, others], clean[:, others])
    assert torch.equal(lse[..., others], clean_lse[..., others])
    assert not lse[..., at].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 20])
def test_a_head_that_is_not_finite(isa, T, dtype):
    """Its neighbours, whose width fills no vector, keep their bits."""
    q, k, v = inputs(1, T, 20, 3, 3, 25, dtype)
    clean = lx.attention(q, k, v)
    for t in (q, k, v):
        t[:, :, 1] = math.nan
    o = lx.attention(q, k, v)
    assert torch.equal(o[:, :, ::2], clean[:, :, ::2]) and o[:, :, 1].isnan().all()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
def test_not_a_number_reaches_who_sees_it(isa, which, bad, D):
    """Of query 100 of 150, or key 100: what depends on it is not finite, and no more than in the
    formula, where a weight of 0 times NaN is NaN; tiles that do not see it have the same bits."""
    T, at = 150, 100
    q, k, v, dout = (randn(1, T, 1, D, dtype=torch.bfloat16) for _ in range(4))
    o, lse, _ = reference(q, k, v, dout, None, {})
    clean = backward(q, k, v, dout, o, lse)
    {"q": q, "k": k, "v": v, "dout": dout}[which][0, at, 0, 3] = bad
    knows = slice(at, T) if which in "kv" else slice(at, at + 1)
    told = reference(q, k, v, dout, None, {})  # by the forward, the queries that see it
    o[0, knows], lse[0, 0, knows] = told[0][0, knows], told[1][0, 0, knows]
    true = reference(*(t.double() for t in (q, k, v, dout)), None, {})[2]
    got = backward(q, k, v, dout, o, lse)
    for g, t in zip(got, true):
        assert g[t.isfinite()].isfinite().all()
    dq, dk, dv = got
    free = slice(0, 96)  # queries, and from 112 on keys, in no 16 x 16 block with the 101st
    assert torch.equal(dq[0, free], clean[0][0, free])
    if math.isnan(bad):
        assert not dq[0, knows].isfinite().all(-1).any()
        assert not dk[0, :at + 1].isfinite().all(-1).any()
    if which == "dout":
        assert torch.equal(dk[0, at + 1:], clean[1][0, at + 1:])


@pytest.mark.parametrize("D", [64, 128])
def test_a_key_of_minus_infinite_score(isa, D):
    """It has the weight 0, and a gradient of 0, and no other notices."""
    q, k, v, dout = (randn(1, 130, 1, D, dtype=torch.bfloat16) for _ in range(4))
    q, k = q.abs() + 0.1, k.clone()
    k[0, 5, 0, 3] = -math.inf
    o, lse, _ = reference(q, k, v, dout, None, {"causal": False})
    dq, dk, dv = backward(q, k, v, dout, o, lse, causal=False)
    assert (dk[0, 5] == 0).all() and (dv[0, 5] == 0).all()
    assert dk.isfinite().all() and dv.isfinite().all()
