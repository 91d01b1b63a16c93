"""What is timed: for each op its shapes, its inputs, and the ways there are to compute it.

A provider takes the inputs and returns one tensor or a tuple. "eager" is the formula as people write
it by hand (llama_ext.ref), "built-in" torch's own fused function, "compile" torch.compile of the
faster-compiling of the two.

B batch, T tokens, H heads, Hkv key/value heads, D width or head dim, F feed-forward width,
V vocabulary, C hidden width.
"""

from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F

import llama_ext as lx


@dataclass
class Case:
    op: str
    shape: str
    inputs: Callable       # dtype -> list of tensors; the floating ones require gradients
    providers: dict        # name -> callable
    frozen: tuple = ()     # positions of inputs that need no gradient


def rmsnorm(rows, D):
    def inputs(dtype):
        return [torch.randn(rows, D).to(dtype), torch.rand(D).to(dtype)]
    return Case("rmsnorm", f"{rows} x {D}", inputs, {
        "llama_ext": lx.rmsnorm,
        "eager": lx.ref.rmsnorm,
        "built-in": lambda x, w: F.rms_norm(x, (D,), w, 1e-6),
        "compile": torch.compile(lx.ref.rmsnorm, dynamic=False),
    })


def rmsnorm_residual(rows, D):
    def inputs(dtype):
        return [torch.randn(rows, D).to(dtype), torch.randn(rows, D).to(dtype),
                torch.rand(D).to(dtype)]

    def builtin(x, residual, w):
        h = x + residual
        return F.rms_norm(h, (D,), w, 1e-6), h
    return Case("rmsnorm_residual", f"{rows} x {D}", inputs, {
        "llama_ext": lx.rmsnorm_residual,
        "eager": lx.ref.rmsnorm_residual,
        "built-in": builtin,
        "compile": torch.compile(lx.ref.rmsnorm_residual, dynamic=False),
    })


def swiglu(rows, width):
    def inputs(dtype):
        return [torch.randn(rows, width).to(dtype) for _ in range(2)]

    def builtin(gate, up):
        return F.silu(gate) * up
    return Case("swiglu", f"{rows} x {width}", inputs, {
        "llama_ext": lx.swiglu,
        "eager": lx.ref.swiglu,
        "built-in": builtin,
        "compile": torch.compile(builtin, dynamic=False),
    })


def _rotate_half(x, cos, sin):
    c, s = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * c + torch.cat((-b, a), -1) * s


def complex_rope(x, cos, sin):
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)


def rope(B, T, H, D, interleaved):
    def inputs(dtype):
        angle = torch.outer(torch.arange(T), 1e4 ** (-torch.arange(0, D, 2) / D))
        return [torch.randn(B, T, H, D).to(dtype), angle.cos(), angle.sin()]
    by_hand = complex_rope if interleaved else _rotate_half
    return Case("rope", f"{B} x {T} x {H} x {D} {'Meta' if interleaved else 'HF'}", inputs, {
        "llama_ext": lambda x, cos, sin: lx.rope(x, cos, sin, interleaved),
        "eager": by_hand,
        "compile": torch.compile(lx.ref.rope if interleaved else by_hand, dynamic=False),
    }, frozen=(1, 2))


def attention(B, T, H, D, Hkv=None):
    Hkv = Hkv or H

    def inputs(dtype):
        return [torch.randn(B, T, heads, D).to(dtype) for heads in (H, Hkv, Hkv)]

    def sdpa(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                              enable_gqa=Hkv != H).transpose(1, 2)
    providers = {"llama_ext": lx.attention, "built-in": sdpa}
    if B * H * T * T <= 1 << 25:  # these keep the whole score matrix
        providers |= {"eager": lx.ref.attention,
                      "compile": torch.compile(lx.ref.attention, dynamic=False)}
    heads = f"{H} heads" if Hkv == H else f"{H}/{Hkv} heads"
    return Case("attention", f"{B} x {T}, {heads}, d{D}", inputs, providers)


def cross_entropy(rows, V):
    def inputs(dtype):
        return [torch.randn(rows, V).to(dtype), torch.randint(V, (rows,))]
    return Case("cross_entropy", f"{rows} x {V}", inputs, {
        "llama_ext": lx.cross_entropy,
        "eager": lx.ref.cross_entropy,
        "built-in": lambda z, t: F.cross_entropy(z.float(), t),
        "compile": torch.compile(lambda z, t: F.cross_entropy(z.float(), t), dynamic=False),
    })


def linear_cross_entropy(rows, C, V):
    def inputs(dtype):
        return [torch.randn(rows, C).to(dtype), (torch.randn(V, C) * C ** -0.5).to(dtype),
                torch.randint(V, (rows,))]

    def builtin(hidden, weight, target):
        return F.cross_entropy(F.linear(hidden, weight).float(), target)
    return Case("linear_cross_entropy", f"{rows} x {C} -> {V}", inputs, {
        "llama_ext": lx.linear_cross_entropy,
        "eager": lx.ref.linear_cross_entropy,
        "built-in": builtin,
        "compile": torch.compile(builtin, dynamic=False),
    })


def linear_int8(rows, K, N):
    """Beside a linear layer with weights in the dtype of x, which reads twice as many bytes."""
    def inputs(dtype):
        weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
        scale = torch.rand(N) / 100
        return [torch.randn(rows, K).to(dtype), weight, scale,
                (weight * scale[:, None]).to(dtype)]
    return Case("linear_int8", f"{rows} x {K} -> {N}", inputs, {
        "llama_ext": lambda x, weight, scale, _: lx.linear_int8(x, weight, scale),
        "eager": lambda x, weight, scale, _: lx.ref.linear_int8(x, weight, scale),
        "full weights": lambda x, _, scale, full: F.linear(x, full),
    }, frozen=(2, 3))


CASES = [
    rmsnorm(2048, 4096), rmsnorm(2048, 320), rmsnorm(8, 4096),
    rmsnorm_residual(2048, 4096), rmsnorm_residual(2048, 320),
    swiglu(2048, 11008), swiglu(2048, 1024), swiglu(8, 11008),
    rope(1, 2048, 32, 128, True), rope(1, 2048, 32, 128, False), rope(8, 256, 6, 64, True),
    attention(4, 512, 8, 64), attention(1, 2048, 32, 128), attention(8, 256, 6, 64),
    attention(1, 1024, 16, 128, Hkv=4),
    cross_entropy(1024, 32000), cross_entropy(2048, 4096),
    linear_cross_entropy(2048, 320, 4096), linear_cross_entropy(1024, 1024, 32000),
    linear_int8(1, 4096, 4096), linear_int8(8, 4096, 4096), linear_int8(256, 1024, 2816),
]
