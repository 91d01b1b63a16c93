"""What is timed: each op at the shapes of a model, its inputs, and the least that it must do.

B batch, T queries, S keys, H heads, Hkv key/value heads, D width of a head, C width, F feed-forward
width, V vocabulary, N = B T rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# C, F, H, D of a size; V is 32,000.
SIZES = {"small": (512, 1408, 8, 64), "7B": (4096, 11008, 32, 128), "13B": (5120, 13824, 40, 128),
         "33B": (6656, 17920, 52, 128), "65B": (8192, 22016, 64, 128)}
SWEEP = "sweep"  # attention over T
VOCABULARY = 32000
TOKENS = {"cpu": {"small": (4, 512), "large": (1, 1024)},  # B, T
          "cuda": {"small": (16, 512), "large": (4, 2048)}}
LOSS_ROWS = {"cpu": 512, "cuda": 8192}
SWEEPS = {"cpu": (2048, 512, (64,), (256, 512, 1024, 2048)),  # tokens in a batch, C, each D, each T
          "cuda": (16384, 2048, (64, 128), (512, 1024, 2048, 4096, 8192, 16384))}


@dataclass(frozen=True)
class Case:
    """bytes, flops: what the forward and the backward must at least move (given the bytes of an
    element) and compute; frozen: positions of inputs that take no gradient; options: what the
    providers need to know beside the inputs."""

    op: str
    shape: str
    inputs: Callable                  # dtype -> list of tensors on the CPU
    bytes: Callable                   # bytes of an element -> (forward, backward)
    flops: tuple = (0, 0)             # forward, backward
    frozen: tuple = ()
    options: dict = field(default_factory=dict)
    backward_alone: bool = True       # False: some make the gradients in the forward already

    def differentiable(self, inputs):
        """Positions of the inputs that take a gradient."""
        return [i for i, t in enumerate(inputs)
                if t.is_floating_point() and i not in self.frozen]


def rmsnorm(N, C):
    return Case("rmsnorm", f"{N} x {C}",
                lambda dtype: [torch.randn(N, C).to(dtype), torch.rand(C).to(dtype)],
                lambda e: (2 * N * C * e, 3 * N * C * e))


def rmsnorm_residual(N, C):
    return Case("rmsnorm_residual", f"{N} x {C}",
                lambda dtype: [torch.randn(N, C).to(dtype), torch.randn(N, C).to(dtype),
                               torch.rand(C).to(dtype)],
                lambda e: (4 * N * C * e, 4 * N * C * e))


def swiglu(N, F):
    return Case("swiglu", f"{N} x {F}",
                lambda dtype: [torch.randn(N, F).to(dtype) for _ in range(2)],
                lambda e: (3 * N * F * e, 5 * N * F * e))


def rope(B, T, H, D, interleaved):
    def inputs(dtype):
        angle = torch.outer(torch.arange(T), 1e4 ** (-torch.arange(0, D, 2) / D))
        return [torch.randn(B, T, H, D).to(dtype), angle.cos(), angle.sin()]
    return Case("rope", f"{B} x {T} x {H} x {D} {'Meta' if interleaved else 'HF'}", inputs,
                lambda e: (2 * B * T * H * D * e,) * 2, frozen=(1, 2),
                options={"interleaved": interleaved})


def attention(B, T, H, D, Hkv=None, S=None):
    """Causal; with S > T = 1 one query over a cache, forward only."""
    Hkv, decode, S = Hkv or H, S is not None, S or T

    def inputs(dtype):
        return [torch.randn(B, rows, heads, D).to(dtype)
                for rows, heads in ((T, H), (S, Hkv), (S, Hkv))]
    pairs = S if decode else T * T / 2
    heads = f"{H} heads" if Hkv == H else f"{H}/{Hkv} heads"
    elements = 2 * B * D * (T * H + S * Hkv)  # q and o, k and v
    forward = 4 * B * H * D * pairs
    return Case("attention", f"{B} x {f'1 of {S}' if decode else T}, {heads}, d{D}", inputs,
                lambda e: (elements * e, 2 * elements * e), (forward, 2.5 * forward),
                frozen=(0, 1, 2) if decode else (), options={"T": T, "S": S, "D": D, "H": H,
                                                             "Hkv": Hkv, "scores": B * H * T * S})


def cross_entropy(N, V):
    return Case("cross_entropy", f"{N} x {V}",
                lambda dtype: [torch.randn(N, V).to(dtype), torch.randint(V, (N,))],
                lambda e: (N * V * e, 2 * N * V * e))


def linear_cross_entropy(N, C, V):
    flops = 2 * N * C * V
    return Case("linear_cross_entropy", f"{N} x {C} -> {V}",
                lambda dtype: [torch.randn(N, C).to(dtype),
                               (torch.randn(V, C) * C ** -0.5).to(dtype), torch.randint(V, (N,))],
                lambda e: ((N + V) * C * e, 2 * (N + V) * C * e), (flops, 2 * flops),
                backward_alone=False)


def linear_int8(N, K, M):
    """Beside a linear layer with weights in the dtype of x, which reads more bytes."""
    def inputs(dtype):
        weight, scale = torch.randint(-127, 128, (M, K), dtype=torch.int8), torch.rand(M) / 100
        return [torch.randn(N, K).to(dtype), weight, scale, (weight * scale[:, None]).to(dtype)]
    return Case("linear_int8", f"{N} x {K} -> {M}", inputs,
                lambda e: (N * (K + M) * e + M * K, N * (K + M) * e + M * K),
                (2 * N * K * M, 2 * N * K * M), frozen=(0, 2, 3))


def of_size(size, backend):
    """The cases of a size: "small", "7B", ... or "sweep", on "cpu" or "cuda"."""
    if size == SWEEP:
        tokens, width, widths, lengths = SWEEPS[backend]
        return [attention(tokens // T, T, width // D, D) for D in widths for T in lengths]
    C, F, H, D = SIZES[size]
    B, T = TOKENS[backend]["small" if size == "small" else "large"]
    rows, V = LOSS_ROWS[backend], VOCABULARY
    return [rmsnorm(B * T, C), rmsnorm_residual(B * T, C), swiglu(B * T, F),
            rope(B, T, H, D, True), rope(B, T, H, D, False),
            attention(B, T, H, D), attention(B, T, H, D, Hkv=H // 4), attention(B, 1, H, D, S=T),
            cross_entropy(rows, V), linear_cross_entropy(rows, C, V),
            linear_int8(1, C, C), linear_int8(8, C, C)]
