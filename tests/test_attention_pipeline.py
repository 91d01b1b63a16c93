"""Attention where the CPU's pipeline for bfloat16 and head dims of 64 and 128 (csrc/cpu/
attention_pipeline.h) has to hand something on: from one span of keys to the next, or because scores
rise after the first keys. And its backward at such sizes."""

import pytest
import torch

import llama_ext as lx
from harness import randn
from test_attention import check, inputs

# B, T, S, H, Hkv, D
SHAPES = [(1, 40, 2200, 1, 1, 64), (1, 600, 600, 2, 1, 64), (1, 600, 600, 2, 1, 128),
          (2, 129, 97, 2, 1, 120), (1, 100, 131, 2, 2, 57)]
MASKS = {"causal": {}, "full": {"causal": False}, "window": {"window": 100},
         "narrow window": {"window": 9}, "full window": {"window": 20, "causal": False}}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spans_and_shared_heads(isa, shape, mask):
    check(*inputs(*shape, torch.bfloat16), **MASKS[mask])


@pytest.mark.parametrize("mask", ["causal", "window"])
@pytest.mark.parametrize("S, D", [(300, 64), (700, 128), (2100, 64)])
def test_scores_that_rise_and_fall(isa, S, D, mask):
    """Along the keys by 6 every 32, or the other way, for queries of one tile in turn."""
    q, k, v = (randn(1, n, 1, D, dtype=torch.bfloat16) for n in (40, S, S))
    q[:, :, 0, 0] = torch.where(torch.arange(40) % 3 == 0, -6, 6)
    k[:, :, 0, 0] = torch.arange(S) / 32 * D**0.5
    check(q, k, v, **MASKS[mask])


@pytest.mark.parametrize("D", [64, 128])
def test_scores_beyond_exact_steps(isa, D):
    """Of 1e6, where one key takes all: its value is the output."""
    q, k, v = (randn(1, 70, 1, D, dtype=torch.bfloat16) for _ in range(3))
    scores = 1e5 * (q[0, :, 0].double() @ k[0, :, 0].double().T)
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    best = scores.masked_fill(~seen, -torch.inf).argmax(-1)
    torch.testing.assert_close(lx.attention(q, k, v, scale=1e5), v[:, best], rtol=2**-7, atol=0)
