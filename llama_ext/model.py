"""The LLaMA model (arXiv 2302.13971) with Meta's parameter names.

B batch, T tokens, C width (dim), V vocabulary, H heads, Hkv key/value heads, D head dim.
"""

import dataclasses
import math

import torch
from torch import nn

from .block import (all_run_as_one_operator, cached_blocks, fused_block, runs_as_one_operator,
                    why_composed)
from .layers import CacheRows, CausalSelfAttention, FeedForward, Linear, RMSNorm, RotaryEmbedding
from .ops import linear, linear_cross_entropy
from .quantize import Int8Linear
from .rope_scaling import check_rope_scaling

_PRESETS = {
    "tiny": {"dim": 320, "n_layers": 6, "n_heads": 5, "vocab_size": 4096, "multiple_of": 64,
             "max_seq_len": 256},  # 10.2M parameters: trains in minutes on a CPU
    "7B": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "13B": {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "33B": {"dim": 6656, "n_layers": 60, "n_heads": 52},
    "65B": {"dim": 8192, "n_layers": 80, "n_heads": 64},
}


@dataclasses.dataclass
class LlamaConfig:
    """The shape of a LLaMA. Raises ValueError for values that do not make a model.

    n_kv_heads None becomes n_heads; hidden_dim None becomes the paper's 2/3 * 4 * dim, rounded up
    to a multiple of multiple_of; head_dim None becomes dim / n_heads. tie_embeddings: the output
    layer is the embedding table. rope_scaling: None, or a dict as in a Hugging Face config, of
    rope_type "llama3" or "linear".
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None
    vocab_size: int = 32000
    hidden_dim: int | None = None
    multiple_of: int = 256
    max_seq_len: int = 2048
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_embeddings: bool = False
    rope_scaling: dict | None = None
    head_dim: int | None = None

    def __post_init__(self):
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of",
                     "max_seq_len"):
            self._expect(name, type(getattr(self, name)) is int and getattr(self, name) > 0,
                         "a positive int")
        if self.hidden_dim is None:
            self.hidden_dim = -(-(8 * self.dim // 3) // self.multiple_of) * self.multiple_of
        self._expect("hidden_dim", type(self.hidden_dim) is int and self.hidden_dim > 0,
                     "a positive int or None")
        if self.head_dim is None:
            self._expect("dim", self.dim % (2 * self.n_heads) == 0,
                         f"a multiple of 2 * n_heads = {2 * self.n_heads}")
            self.head_dim = self.dim // self.n_heads
        self._expect("head_dim", type(self.head_dim) is int and self.head_dim > 0
                     and self.head_dim % 2 == 0, "a positive even int or None")
        self._expect("n_kv_heads", self.n_heads % self.n_kv_heads == 0,
                     f"a divisor of n_heads = {self.n_heads}")
        self._expect("norm_eps", self.norm_eps >= 0, "a number >= 0")
        self._expect("rope_theta", self.rope_theta > 0, "a number > 0")
        try:
            self.rope_scaling = check_rope_scaling(self.rope_scaling)
        except ValueError as error:
            raise ValueError(f"LlamaConfig: {error}") from None

    def _expect(self, name, ok, expected):
        if not ok:
            raise ValueError(
                f"LlamaConfig: {name}: expected {expected}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name, **overrides):
        """The paper's "7B", "13B", "33B", "65B", or "tiny" (10.2M), with fields overridden."""
        if name not in _PRESETS:
            raise ValueError(f"LlamaConfig: preset: expected one of {', '.join(_PRESETS)}, "
                             f"got {name!r}")
        return cls.from_dict({**_PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, fields):
        """The inverse of to_dict(); fields left out have their defaults."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(f"LlamaConfig: field: expected one of {', '.join(known)}, "
                                 f"got {name!r}")
        return cls(**fields)

    def to_dict(self):
        """The fields; head_dim only where it is not dim / n_heads, its meaning when left out."""
        fields = dataclasses.asdict(self)
        if self.q_dim == self.dim:
            del fields["head_dim"]
        return fields

    @property
    def q_dim(self):
        """Width of all heads' queries, n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self):
        """Width of all heads' keys, or values, n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim


class KVCache:
    """The keys and values of every layer for the positions seen so far, `length` of them.

    k, v: (n_layers, B, max_len, Hkv, D), allocated once. Hand it to Llama.forward under
    torch.no_grad() or torch.inference_mode(); set length = 0 to use it again. dtype is that of the
    model's activations. Raises ValueError for a max_len beyond config.max_seq_len.
    """

    def __init__(self, config, batch, max_len=None, dtype=None, device=None):
        max_len = config.max_seq_len if max_len is None else max_len
        if not 0 < max_len <= config.max_seq_len:
            raise ValueError(f"KVCache: max_len: expected 1 to max_seq_len = {config.max_seq_len}, "
                             f"got {max_len}")
        shape = (config.n_layers, batch, max_len, config.n_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0


class TransformerBlock(nn.Module):
    """One pre-norm layer. It takes and returns a pair: the newest sub-layer's output x, and the
    residual stream it has yet to be added to, both (B, T, C), so that each addition and the norm
    behind it are one kernel. In training it is one autograd function with a hand-written backward,
    and for a few tokens with a cache on the CPU one operator; block.why_composed and
    block.runs_as_one_operator tell when it is not."""

    def __init__(self, config, rotary, device=None, dtype=None):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.attention = CausalSelfAttention(config.dim, config.n_heads, config.n_kv_heads,
                                             rotary=rotary, head_dim=config.head_dim, **options)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim, **options)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, **options)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, **options)

    def forward(self, x, residual=None, start_pos=0, cache=None):
        """residual None: x is itself the stream, as in the first layer."""
        if cache is None and why_composed(self) is None:
            return fused_block(self, x, residual, start_pos)
        if isinstance(start_pos, CacheRows) and runs_as_one_operator(self, x):
            return cached_blocks([self], x, residual, start_pos, *(t[None] for t in cache))
        if residual is None:
            h, residual = self.attention_norm(x), x
        else:
            h, residual = self.attention_norm(x, residual)
        h = self.attention(h, start_pos, cache=cache)
        h, residual = self.ffn_norm(h, residual)
        return self.feed_forward(h), residual


class Llama(nn.Module):
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions (interleaved), SwiGLU, no
    biases, the output layer not tied to the embeddings unless the config says so.

    For a model too large to initialise twice: `with torch.device("meta"): model = Llama(config)`,
    then model.to_empty(device=...) and load a state_dict or call reset_parameters().
    """

    def __init__(self, config, device=None, dtype=None):
        super().__init__()
        self.config = config
        options = {"device": device, "dtype": dtype}
        rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_seq_len,
                                 device=device, scaling=config.rope_scaling)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, **options)
        self.layers = nn.ModuleList(
            TransformerBlock(config, rotary, **options) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, **options)
        self.output = None if config.tie_embeddings else Linear(
            config.dim, config.vocab_size, **options)
        self.loss = linear_cross_entropy  # of forward(tokens, targets)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator=None):
        """Matrices from normal(0, 0.02), those that write to the residual stream (wo, w2) from
        normal(0, 0.02 / sqrt(2 * n_layers)); norm weights 1."""
        for name, parameter in self.named_parameters():
            self.init_parameter(name, parameter, generator)

    def init_parameter(self, name, out, generator=None):
        """Fill `out` as reset_parameters() fills the parameter `name`."""
        if out.dim() == 1:
            out.fill_(1)
        else:
            writes = name.endswith(("wo.weight", "w2.weight"))
            std = 0.02 / math.sqrt(2 * self.config.n_layers) if writes else 0.02
            out.normal_(0, std, generator=generator)

    def num_parameters(self):
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, tokens, targets=None, cache=None, last_only=False, rows=None):
        """tokens (B, T), int64 -> logits (B, T, V); the loss, a scalar, if targets are given.

        targets: (B, T), int64, -100 where nothing is to be predicted; the mean cross-entropy over
        the rest, fp32, without ever holding all logits. cache: a KVCache with the positions before
        these tokens; they are added to it. last_only: the logits of the last token alone,
        (B, 1, V). rows: a layers.CacheRows, for tokens (1, N) that continue rows of the cache which
        hold different numbers of positions; the caller keeps count of them, cache.length is not
        used, and last_only gives the tokens that are rows.last. Raises ValueError for ids outside
        the vocabulary (on CPU; elsewhere the device's own assertion fails), and for more positions
        than max_seq_len or the cache has room for.
        """
        if tokens.dim() != 2:
            raise ValueError(f"Llama: tokens: expected (B, T), got shape {tuple(tokens.shape)}")
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if rows is not None:
            start, end = rows, 0
        if end > self.config.max_seq_len:
            raise ValueError("Llama: tokens: expected at most max_seq_len = "
                             f"{self.config.max_seq_len} positions, got {end}")
        x, residual = self._embed(tokens), None
        layers = list(self.layers)
        if rows is not None and all_run_as_one_operator(layers, TransformerBlock, x):
            x, residual = cached_blocks(layers, x, residual, rows, cache.k, cache.v)
        else:
            for i, layer in enumerate(layers):
                layer_cache = None if cache is None else (cache.k[i], cache.v[i])
                x, residual = layer(x, residual, start, layer_cache)
        if cache is not None and rows is None:
            cache.length = end
        h, _ = self.norm(x, residual)  # (B, T, C)
        if targets is not None:
            return self.loss(h, self._output_weight(h.dtype), targets)
        if last_only:
            h = h[:, -1:] if rows is None else h[:, rows.last]
        if isinstance(self.output, Int8Linear):
            return self.output(h)
        return linear(h, self._output_weight(h.dtype))

    def _output_weight(self, dtype):
        if isinstance(self.output, Int8Linear):
            return self.output.dequantize(dtype)
        return (self.tok_embeddings if self.output is None else self.output).weight

    def _embed(self, tokens):
        try:
            return self.tok_embeddings(tokens)
        except IndexError:
            low, high = torch.aminmax(tokens)
            raise ValueError(f"Llama: tokens: expected ids from 0 to {self.config.vocab_size - 1}, "
                             f"got {low} to {high}") from None
