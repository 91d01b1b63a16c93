"""What is particular to the CUDA kernels of attention's backward: every way they take through tiles
and options, called directly, with o and lse from the formula; their traffic and machine code, on the
virtual A100."""

import itertools
import math

import pytest
import torch

import compare
import llama_ext as lx
from harness import DTYPES, LAYOUTS, randn

HALF = [torch.bfloat16, torch.float16]
MASKS = {"causal": {}, "full": {"causal": False}, "causal window": {"window": 70},
         "full window": {"window": 21, "causal": False}}
every_mask = pytest.mark.parametrize("mask", MASKS)


def inputs(B, T, S, H, Hkv, D, dtype, **kwargs):
    return [randn(B, n, h, D, dtype=dtype, **kwargs) for n, h in ((T, H), (S, Hkv), (S, Hkv))]


def formula(q, k, v, dout, dlse, options):
    """o, lse and the gradients of q, k, v by PyTorch, in the precision of q."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    o, lse = lx.ref.attention(q, k, v, return_lse=True, **options)
    wanted = [(o, dout), (lse, dlse)][:1 if dlse is None else 2]
    grads = torch.autograd.grad([o for o, _ in wanted], (q, k, v),
                                [g.to(o.dtype) for o, g in wanted])
    return o.detach(), lse.detach(), grads


def backward(q, k, v, dout, o, lse, dlse, *, scale=None, causal=True, window=None,
             cu_seqlens=None):
    cu_q, cu_k = (None, None) if cu_seqlens is None else cu_seqlens
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.llama_ext.attention_bwd(dout, dlse, q, k, v, o, lse, scale, causal,
                                             window or 0, cu_q, cu_k)


def check(q, k, v, *, dlse=False, dout_layout=lambda t: t, roundings=None, **options):
    """The gradients by compare.py's rule. A score s is off by about |s| roundings, and so,
    relatively, is its weight in fp32."""
    dout = dout_layout(randn(*q.shape, dtype=q.dtype))
    acc = torch.promote_types(q.dtype, torch.float32)
    heads = q.shape[-2]
    shape = (heads, q.shape[0]) if q.dim() == 3 else (q.shape[0], heads, q.shape[1])
    dlse = randn(*shape, dtype=acc) if dlse else None
    o, lse, true = formula(*(t.double() for t in (q, k, v, dout)),
                           dlse if dlse is None else dlse.double(), options)
    base = formula(q, k, v, dout, dlse, options)[2]
    if dlse is not None:  # the formula has no gradient there
        dlse = dlse.masked_fill(lse == -math.inf, 0)
    got = backward(q, k, v, dout, o.to(q.dtype), lse.to(acc), dlse, **options)
    longest = [t.double().norm(dim=-1).max().item() for t in (q, k)]
    score = longest[0] * longest[1] * abs(options.get("scale") or q.shape[-1] ** -0.5)
    for name, g, t, b in zip(("dq", "dk", "dv"), got, true, base):
        compare.check(g, t, b, q.dtype, name, 3 + score)
    return got


SIZES = [1, 17, 63, 64, 65, 127, 129, 200, 257]
# every size of T against three of S
PAIRS = [(T, SIZES[(i * n + n) % 9]) for i, T in enumerate(SIZES) for n in (1, 2, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@every_mask
@pytest.mark.parametrize("T, S", PAIRS)
def test_sizes(T, S, mask, dtype):
    D = (64, 128, 40)[(T + S) % 3] if dtype in HALF else (64, 24, 5)[(T + S) % 3]
    H, Hkv = ((2, 1), (2, 2), (3, 1), (4, 2))[T % 4]
    check(*inputs(1 + S % 2, T, S, H, Hkv, D, dtype), dlse=T % 2 == 0 or S == 1, **MASKS[mask])


@pytest.mark.parametrize("dtype", DTYPES)
@every_mask
@pytest.mark.parametrize("D", [1, 7, 8, 56, 72, 96, 120, 136, 192, 200, 256, 264])
def test_head_dims(D, mask, dtype):
    check(*inputs(1, 70, 133, 2, 1, D, dtype), dlse=True, **MASKS[mask])
