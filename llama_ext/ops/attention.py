"""Softmax attention: causal or not, grouped heads, sliding window, packed sequences."""

import torch

from ._library import autocast_dtype, fake, kernel, needs_grad, single_backward

attention_fwd = kernel("attention_fwd")
attention_bwd = kernel("attention_bwd")


@fake("attention_fwd")
def _(q, k, v, scale, causal, window, cu_q, cu_k):
    *batch, tokens, heads, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*batch, heads, tokens), dtype=acc)


@fake("attention_bwd")
def _(dout, dlse, q, k, v, o, lse, scale, causal, window, cu_q, cu_k):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, causal, window, cu_q, cu_k):
        o, lse = attention_fwd(q, k, v, scale, causal, window, cu_q, cu_k)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
        ctx.options = scale, causal, window
        ctx.set_materialize_grads(False)
        return o, lse

    @single_backward("attention")
    def backward(ctx, dout, dlse):
        q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
        dout = torch.zeros_like(o) if dout is None else dout
        dlse = None if dlse is None else dlse.contiguous()
        grads = attention_bwd(dout, dlse, q, k, v, o, lse, *ctx.options, cu_q, cu_k)
        return tuple(g if need else None for g, need in zip(grads, ctx.needs_input_grad)) + \
            (None,) * 5


def _offsets(cu_seqlens):
    """(cu_q, cu_k), int32 and contiguous, of cu_seqlens: None, one tensor for both, or a pair."""
    if cu_seqlens is None:
        return None, None
    pair = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2 or not all(torch.is_tensor(c) and c.dtype in (torch.int32, torch.int64)
                                 for c in pair):
        got = [c.dtype if torch.is_tensor(c) else type(c).__name__ for c in pair]
        raise RuntimeError("attention: cu_seqlens: expected an int32 or int64 tensor, or one for "
                           f"queries and one for keys, got {', '.join(map(str, got))}")
    cu_q, cu_k = (c.to(torch.int32).contiguous() for c in pair)
    return cu_q, cu_k


def attention(q, k, v, *, scale=None, causal=True, window=None, cu_seqlens=None, return_lse=False):
    """softmax(scale * q k^T) v over the keys each query sees, without the matrix of scores.

    Online softmax (arXiv 1805.02867) over tiles, and a backward that recomputes them from the
    log-sum-exp (FlashAttention, arXiv 2205.14135).

    q: (B, T, H, D); k, v: (B, S, Hkv, D), float32, bfloat16, float16 or float64 (under autocast
    cast to its dtype), any strides, no copy when the last is 1. H is a multiple of Hkv: H / Hkv
    query heads share a key/value head. scale: 1 / sqrt(D) when None. causal: query i sees the keys
    up to i + S - T. window: it sees the `window` most recent of those, its own position i + S - T
    included (and, when not causal, as many ahead).
    cu_seqlens: for packed sequences of different lengths, q (N, H, D) and k, v (M, Hkv, D):
    sequences + 1 rising offsets, int32 or int64, or a pair of such for queries and for keys.
    Returns o like q, contiguous; with return_lse also the natural log of sum(exp(scores)),
    (B, H, T) or packed (H, N), in fp32 (fp64 for float64), which has a gradient too. A query that
    sees no key gets o = 0 and lse = -inf. Raises RuntimeError for shapes, dtypes, devices or
    offsets that do not fit.
    """
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if window is not None and window < 1:
        raise RuntimeError(f"attention: window: expected at least 1 or None, got {window}")
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    options = float(scale), causal, window or 0, *_offsets(cu_seqlens)
    fn = _Attention.apply if needs_grad(q, k, v) else attention_fwd
    o, lse = fn(q, k, v, *options)
    return (o, lse) if return_lse else o
