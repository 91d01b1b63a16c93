"""A tiny Llama trained for a few steps: the same losses on every backend (test_cuda_training.py).

As a script, on the CPU's kernels: python tiny_training.py DTYPE RUN_IN ATTENTION prints the losses.
"""

import json
import sys

import torch
import torch.nn.functional as F

from llama_ext import LlamaConfig, layers
from llama_ext.model import Llama

STEPS = 4


def torch_attention(q, k, v, *, scale=None, causal=True, window=None):
    """layers' attention from torch: (B, T, H, D), causal, no window."""
    assert causal and window is None
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True,
                                          scale=scale, enable_gqa=True).transpose(1, 2)


def losses(dtype, run_in, attention):
    """Losses of STEPS steps of a model whose weights are rounded to dtype, and kept and trained in
    run_in. attention: "torch", or "ours"."""
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=97,
                         multiple_of=32, max_seq_len=48)
    generator = torch.Generator().manual_seed(0)
    model = Llama(config)
    model.reset_parameters(generator)
    model.to(dtype).to(run_in)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-4)
    kept, seen = layers.attention, []
    if attention == "torch":
        layers.attention = torch_attention
    tokens = torch.randint(97, (2, 41), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :7] = -100
    try:
        for _ in range(STEPS):
            loss = model(tokens[:, :-1], targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    finally:
        layers.attention = kept
    return seen


if __name__ == "__main__":
    dtype, run_in, attention = sys.argv[1:]
    print(json.dumps(losses(getattr(torch, dtype), getattr(torch, run_in), attention)))
