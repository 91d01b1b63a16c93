"""Each operation as a short, plain PyTorch formula: the definition.

Tests and benchmarks compare the kernels with these. They take any floating dtype; intermediate
values are fp32 (fp64 for fp64 inputs) where Meta's LLaMA code has them so, and attention makes its
matrix products in the dtype of its inputs, as that code does. Nothing here is fast, and attention
materialises the whole score matrix.

B batch, T queries, S keys, H heads, Hkv key/value heads, D width or head dim, F feed-forward
width, V vocabulary, C hidden width.
"""

import torch


def _acc(x):
    return torch.promote_types(x.dtype, torch.float32)


def rmsnorm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight; (..., D), (D,) -> (..., D). arXiv 1910.07467, eq. 4."""
    xf = x.to(_acc(x))
    y = xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(y.dtype)).to(x.dtype)


def rmsnorm_residual(x, residual, weight, eps=1e-6):
    """h = x + residual; (rmsnorm(h), h)."""
    h = x + residual
    return rmsnorm(h, weight, eps), h


def swiglu(gate, up=None):
    """silu(gate) * up, elementwise; without up both are in gate, (..., 2F). arXiv 2002.05202,
    eq. 6, with Swish_1."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    g = gate.to(_acc(gate))
    return (g * torch.sigmoid(g) * up.to(g.dtype)).to(gate.dtype)


def rope(x, cos, sin, interleaved=True):
    """Rotate pairs of x (B, T, H, D) by the angles of cos, sin (T, D/2) or (B, T, D/2).

    interleaved: pairs (2i, 2i+1), as Meta's code; otherwise (i, i + D/2), as Hugging Face's.
    arXiv 2104.09864, eq. 34.
    """
    c, s = (t.to(_acc(x)).unsqueeze(-2) for t in (cos, sin))  # (..., T, 1, D/2)
    xf = x.to(_acc(x))
    if interleaved:
        a, b = xf[..., 0::2], xf[..., 1::2]
    else:
        a, b = xf.chunk(2, -1)
    ra, rb = a * c - b * s, a * s + b * c
    y = torch.stack((ra, rb), -1).flatten(-2) if interleaved else torch.cat((ra, rb), -1)
    return y.to(x.dtype)


def rope_qk(q, k, cos, sin, interleaved=True):
    """(rope(q, ...), rope(k, ...))."""
    return rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)


def attention_mask(T, S, causal=True, window=None, device=None):
    """(T, S) bool, True where query i sees key j: causal is aligned bottom-right; `window` keeps
    the w most recent of the keys at or before the query's own position i + S - T (and, when not
    causal, as many ahead)."""
    i = torch.arange(T, device=device)[:, None] + (S - T)
    j = torch.arange(S, device=device)[None, :]
    mask = j <= i if causal else torch.ones(T, S, dtype=torch.bool, device=device)
    if window is not None:
        mask = mask & (j > i - window)
        if not causal:
            mask = mask & (j < i + window)
    return mask


def attention(q, k, v, *, scale=None, causal=True, window=None, cu_seqlens=None, return_lse=False):
    """softmax(scale * q k^T + mask) v; q (B, T, H, D), k, v (B, S, Hkv, D) -> (B, T, H, D).

    With cu_seqlens (n + 1 rising offsets, or a pair of such for queries and keys) q, k, v are
    packed (N, H, D) and each sequence attends to itself. A row that sees nothing gives zeros and
    lse -inf. lse, (B, H, T) or (H, N), is the natural log of the sum of exp(scores).
    """
    if cu_seqlens is not None:
        cu_q, cu_k = cu_seqlens if isinstance(cu_seqlens, (tuple, list)) else (cu_seqlens,) * 2
        spans = zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:])
        parts = [attention(q[None, a:b], k[None, c:d], v[None, c:d], scale=scale, causal=causal,
                           window=window, return_lse=True) for a, b, c, d in spans]
        o = torch.cat([p[0][0] for p in parts]) if parts else q.new_zeros(q.shape)
        if not return_lse:
            return o
        lse = [p[1][0] for p in parts] or [q.new_zeros(q.shape[1], 0, dtype=_acc(q))]
        return o, torch.cat(lse, -1)
    (B, T, H, D), (S, Hkv) = q.shape, k.shape[1:3]
    scale = D ** -0.5 if scale is None else scale
    qh = q.transpose(1, 2)                                             # (B, H, T, D)
    kh, vh = (t.repeat_interleave(H // Hkv, 2).transpose(1, 2) for t in (k, v))  # (B, H, S, D)
    scores = qh @ kh.transpose(-1, -2) * scale                         # (B, H, T, S)
    mask = attention_mask(T, S, causal, window, q.device)
    scores = scores.to(_acc(q)).masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1).masked_fill(~mask.any(-1, keepdim=True), 0)
    o = (p.to(q.dtype) @ vh).transpose(1, 2)
    return (o, torch.logsumexp(scores, -1)) if return_lse else o


def cross_entropy(logits, target, ignore_index=-100, *, reduction="mean", label_smoothing=0.0,
                  z_loss=0.0):
    """logsumexp(logits) - (1 - label_smoothing) logits[target] - label_smoothing mean(logits)
    + z_loss logsumexp(logits)^2 of each row; (..., V), (...) -> scalar, or (...) for "none".

    fp32 (fp64 for fp64 logits); rows whose target is ignore_index count for nothing; the mean is
    NaN when no row counts, as torch.nn.functional.cross_entropy.
    """
    z = logits.to(_acc(logits)).reshape(-1, logits.shape[-1])
    t = target.reshape(-1)
    keep = t != ignore_index
    picked = z.gather(1, torch.where(keep, t, 0)[:, None])[:, 0]
    lse = torch.logsumexp(z, -1)
    loss = lse - picked
    if label_smoothing:
        loss = loss + label_smoothing * (picked - z.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    loss = torch.where(keep, loss, 0)
    if reduction == "none":
        return loss.view(target.shape)
    return loss.sum() / keep.sum() if reduction == "mean" else loss.sum()


def linear_int8(x, weight, scale):
    """x @ (scale[:, None] * weight).T; x (..., K), weight int8 (N, K), scale (N,) -> (..., N)."""
    return x @ (weight * scale[:, None].to(_acc(x))).to(x.dtype).t()


def linear_cross_entropy(hidden, weight, target, ignore_index=-100, **options):
    """cross_entropy(hidden @ weight.T, ...); hidden (..., C), weight (V, C), target (...)."""
    return cross_entropy(hidden @ weight.t(), target, ignore_index, **options)
