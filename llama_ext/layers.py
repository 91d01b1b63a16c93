"""Drop-in nn.Modules around the kernels: put them into any model, in place of torch's own.

B batch, T tokens, S positions a cache holds, H heads, Hkv key/value heads, D head dim, C width.
"""

import torch
from torch import nn

from .ops import attention, linear, rmsnorm, rmsnorm_residual, rope_qk, swiglu
from .rope_scaling import check_rope_scaling, rope_frequencies


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

    forward(x) -> y, both (..., dim); forward(x, residual) -> (rmsnorm(x + residual), x + residual)
    in one kernel. weight: (dim,), in the dtype of x or fp32.
    """

    def __init__(self, dim, eps=1e-6, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x, residual=None):
        return self.normalize(x, residual, self.weight)

    def normalize(self, x, residual, weight):
        if residual is None:
            return rmsnorm(x, weight, self.eps)
        return rmsnorm_residual(x, residual, weight, self.eps)

    def extra_repr(self):
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """forward(gate, up) = silu(gate) * up, elementwise (arXiv 2002.05202, eq. 6); forward(gate_up)
    of (..., 2F) with both in one, gate first."""

    def forward(self, gate, up=None):
        return swiglu(gate, up)


class Linear(nn.Linear):
    """nn.Linear without bias, (..., in_features) -> (..., out_features). Generation's few rows get
    a kernel of their own on the CPU (ops.linear)."""

    def __init__(self, in_features, out_features, device=None, dtype=None):
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def forward(self, x):
        return linear(x, self.weight) if self.bias is None else super().forward(x)


class FeedForward(nn.Module):
    """w2(swiglu(w1(x), w3(x))), (..., dim) -> (..., dim), without biases (Meta's names)."""

    def __init__(self, dim, hidden_dim, device=None, dtype=None):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.w1 = Linear(dim, hidden_dim, **options)
        self.w2 = Linear(hidden_dim, dim, **options)
        self.w3 = Linear(dim, hidden_dim, **options)
        self.swiglu = SwiGLU()

    def reset_parameters(self):
        for linear in (self.w1, self.w2, self.w3):
            linear.reset_parameters()

    def forward(self, x):
        return self.w2(self.swiglu(self.w1(x), self.w3(x)))


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864, eq. 34): position p turns pair i by
    p / theta^(2i / head_dim).

    interleaved=True rotates the pairs (2i, 2i+1), as Meta's weights want it; False the pairs
    (i, i + head_dim/2), as Hugging Face's. One module may serve every layer of a model. scaling:
    None, or a dict as in a Hugging Face config for rope type "llama3" or "linear", see
    rope_scaling.py. Raises ValueError for an odd head_dim and a scaling that is none of these.

    cos and sin, (max_seq_len, head_dim/2), are made in fp64 and rounded once to fp32. They follow
    the module between devices, stay fp32 whatever dtype it is cast to, are right even after
    to_empty(), and are in no state_dict.
    """

    def __init__(self, head_dim, theta=10000.0, max_seq_len=2048, interleaved=True, device=None,
                 scaling=None):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"RotaryEmbedding: head_dim: expected an even number, got {head_dim}")
        self.head_dim, self.theta, self.interleaved = head_dim, theta, interleaved
        self.scaling = check_rope_scaling(scaling)
        self._fill(max_seq_len, torch.get_default_device() if device is None else device)

    @torch.inference_mode(False)  # tables first grown while generating must serve training too
    def _fill(self, length, device):
        position = torch.arange(length, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, rope_frequencies(self.head_dim, self.theta, self.scaling))
        self.register_buffer("cos", angle.cos().float().to(device), persistent=False)
        self.register_buffer("sin", angle.sin().float().to(device), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._fill(self.cos.shape[0], self.cos.device)
        return self

    def tables(self, tokens, start_pos=0, positions=None, dtype=torch.float32):
        """cos and sin of T = `tokens` tokens, (T, D/2) or (B, T, D/2), for data of this dtype.

        Token t stands at position start_pos + t (the tables grow when that exceeds them), or at
        positions[b, t], int64 (B, T), if given; those must lie below max_seq_len, checked on the
        device without waiting for it. Raises ValueError for a negative start_pos, RuntimeError for
        positions outside the tables.
        """
        if positions is None:
            end = start_pos + tokens
            if start_pos < 0:
                raise ValueError(f"RotaryEmbedding: start_pos: expected >= 0, got {start_pos}")
            if end > self.cos.shape[0]:
                self._fill(max(end, 2 * self.cos.shape[0]), self.cos.device)
            cos, sin = self.cos[start_pos:end], self.sin[start_pos:end]  # (T, D/2)
        else:
            length = self.cos.shape[0]
            torch._assert_async(
                ((positions >= 0) & (positions < length)).all(),
                f"RotaryEmbedding: positions: expected 0 to {length - 1} (max_seq_len - 1), "
                "got some outside")
            cos, sin = self.cos[positions], self.sin[positions]          # (B, T, D/2)
        acc = torch.promote_types(dtype, torch.float32)
        return cos.to(acc), sin.to(acc)

    def forward(self, q, k, start_pos=0, positions=None):
        """q (B, T, H, D) and k (B, T, Hkv, D), rotated.

        start_pos, positions: where the tokens stand, as in tables().
        """
        cos, sin = self.tables(q.shape[1], start_pos, positions, q.dtype)
        return rope_qk(q, k, cos, sin, self.interleaved)

    def extra_repr(self):
        return (f"{self.head_dim}, theta={self.theta}, max_seq_len={self.cos.shape[0]}, "
                f"interleaved={self.interleaved}"
                + (f", scaling={self.scaling}" if self.scaling else ""))


class CacheRows:
    """Where packed tokens go that continue R of a cache's B rows, each row by a number of its own.

    rows: rising row numbers; starts: the positions that each holds; counts: the tokens, 1 or more,
    that each is continued by; last_counts: of how many of those, the last ones, the model's
    logits are wanted (default: 1 each); all lists of R ints. size: (B, S) of the cache. The
    N = sum(counts) tokens come one row after another, without padding.
    Attributes, on `device`: positions, int64 (1, N); last, int64 (sum(last_counts),): the indices
    of the tokens whose logits are wanted; slots, int64 (N,): where among the cache's B * S
    positions the tokens go; cu_seqlens, a pair of int32: offsets for attention. Raises ValueError
    when they do not fit into the cache.
    """

    def __init__(self, rows, starts, counts, size, last_counts=None, device=None):
        B, S = size
        ends = [start + count for start, count in zip(starts, counts)]
        if sorted(set(rows)) != rows or not 0 <= rows[0] <= rows[-1] < B:
            raise ValueError(f"CacheRows: rows: expected rising numbers from 0 to {B - 1}, "
                             f"got {rows}")
        if min(starts) < 0 or min(counts) < 1 or max(ends) > S:
            raise ValueError("CacheRows: expected starts >= 0, counts >= 1 and sums of both up to "
                             f"the cache's {S} positions, got starts {starts}, counts {counts}")
        self._view = (rows[0], ends[0]) if len(rows) == 1 else None
        positions, slots, last, cu_q, cu_k = [], [], [], [0], [0]
        for row, start, end, wanted in zip(rows, starts, ends, last_counts or [1] * len(rows)):
            positions += range(start, end)
            slots += range(row * S + start, row * S + end)
            last += range(len(positions) - wanted, len(positions))
            # A sequence without queries stands for the keys from one row's end to the next row.
            cu_q += [cu_q[-1], len(positions)]
            cu_k += [row * S, row * S + end]

        def put(values, dtype=torch.int64):
            return torch.tensor(values, dtype=dtype, device=device)

        self.positions, self.last, self.slots = put([positions]), put(last), put(slots)
        self.cu_seqlens = put(cu_q + cu_q[-1:], torch.int32), put(cu_k + [B * S], torch.int32)
        self._tables = {}

    def tables(self, rotary, dtype):
        """rotary.tables() of the positions: of a RotaryEmbedding that layers share, made once."""
        key = rotary, dtype
        if key not in self._tables:
            self._tables[key] = rotary.tables(0, positions=self.positions, dtype=dtype)
        return self._tables[key]

    def attend(self, q, k, v, cache, window=None):
        """Writes k, v (1, N, Hkv, D) into the cache, a pair (B, S, Hkv, D); attention of each token
        of q (1, N, H, D) to its row's positions up to its own. Returns o like q."""
        for tensor, new in zip(cache, (k, v)):
            tensor.flatten(0, 1).index_copy_(0, self.slots, new[0])
        if self._view:  # one row: the kernels for few queries, which want (B, T, H, D), serve it
            row, end = self._view
            return attention(q, *(t[row:row + 1, :end] for t in cache), window=window)
        return attention(q[0], *(t.flatten(0, 1) for t in cache), window=window,
                         cu_seqlens=self.cu_seqlens)


class CausalSelfAttention(nn.Module):
    """wo(attention(rotary(wq(x)), rotary(wk(x)), wv(x))), without biases (Meta's names).

    n_kv_heads < n_heads shares each key/value head among n_heads / n_kv_heads query heads (GQA).
    window=w lets each token see only its w most recent ones, itself included. rotary: a
    RotaryEmbedding to share with other layers; by default the layer has its own. head_dim: dim /
    n_heads unless given. Raises ValueError for numbers that do not fit together.
    """

    def __init__(self, dim, n_heads, n_kv_heads=None, window=None, rotary=None, device=None,
                 dtype=None, head_dim=None):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or head_dim is None and dim % n_heads:
            raise ValueError(f"CausalSelfAttention: dim: expected a multiple of n_heads {n_heads}, "
                             f"got {dim}")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError("CausalSelfAttention: n_kv_heads: expected a divisor of n_heads "
                             f"{n_heads}, got {n_kv_heads}")
        if head_dim is not None and (head_dim < 2 or head_dim % 2):
            raise ValueError("CausalSelfAttention: head_dim: expected an even number >= 2 or None, "
                             f"got {head_dim}")
        if window is not None and window < 1:
            raise ValueError(f"CausalSelfAttention: window: expected >= 1 or None, got {window}")
        self.n_heads, self.n_kv_heads, self.window = n_heads, n_kv_heads, window
        self.head_dim = dim // n_heads if head_dim is None else head_dim
        options = {"device": device, "dtype": dtype}
        self.wq = Linear(dim, n_heads * self.head_dim, **options)
        self.wk = Linear(dim, n_kv_heads * self.head_dim, **options)
        self.wv = Linear(dim, n_kv_heads * self.head_dim, **options)
        self.wo = Linear(n_heads * self.head_dim, dim, **options)
        self.rotary = RotaryEmbedding(self.head_dim, device=device) if rotary is None else rotary

    def reset_parameters(self):
        for linear in (self.wq, self.wk, self.wv, self.wo):
            linear.reset_parameters()

    def forward(self, x, start_pos=0, positions=None, cache=None):
        """(B, T, C) -> (B, T, C).

        start_pos, positions: where the tokens stand, as in RotaryEmbedding. cache: a pair of
        tensors k, v, each (B, S, Hkv, D), whose first start_pos rows are filled: the T new rows are
        written behind them and the tokens attend to all start_pos + T (for inference: no gradient
        flows through rows of earlier calls). Raises ValueError when they do not fit. With a
        CacheRows for start_pos, x is (1, N, C): packed tokens, each written where that says.
        """
        if x.dim() != 3:
            raise ValueError(f"CausalSelfAttention: x: expected (B, T, {self.wq.in_features}), "
                             f"got shape {tuple(x.shape)}")
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.wk(x).view(B, T, -1, self.head_dim)  # (B, T, Hkv, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)
        if isinstance(start_pos, CacheRows):
            q, k = rope_qk(q, k, *start_pos.tables(self.rotary, q.dtype), self.rotary.interleaved)
            return self.wo(start_pos.attend(q, k, v, cache, self.window).reshape(B, T, -1))
        q, k = self.rotary(q, k, start_pos, positions)
        if cache is not None:
            k, v = self._append(k, v, cache, start_pos)
        return self.wo(attention(q, k, v, window=self.window).reshape(B, T, -1))

    def _append(self, k, v, cache, start_pos):
        """Writes k, v behind the cache's first start_pos rows; returns views of all filled rows."""
        k_cache, v_cache = cache
        end = start_pos + k.shape[1]
        if k_cache.shape[0] != k.shape[0] or k_cache.shape[1] < end:
            raise ValueError(
                f"CausalSelfAttention: cache: expected batch {k.shape[0]} and room for {end} "
                f"positions, got batch {k_cache.shape[0]} and {k_cache.shape[1]} positions")
        k_cache[:, start_pos:end] = k
        v_cache[:, start_pos:end] = v
        return k_cache[:, :end], v_cache[:, :end]

    def extra_repr(self):
        return (f"dim={self.wq.in_features}, n_heads={self.n_heads}, "
                f"n_kv_heads={self.n_kv_heads}, window={self.window}, head_dim={self.head_dim}")
