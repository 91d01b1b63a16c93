"""The transformer block as one autograd function with a backward written by hand, as the LLaMA
paper has it (arXiv 2302.13971, section 2.3).

The forward keeps what is expensive to make again: the linear layers' outputs (queries and keys
after their rotation), the attention's output and log-sum-exp, and the residual stream as it came
in. The backward makes the cheap rest again with the fused kernels: both norms and the SwiGLU
product. No matrix product and no attention runs twice. Kept per token, in elements:
2 C + 2 H D + 2 Hkv D + 2 F, and H fp32 numbers. C of it is the stream, which under autocast is
fp32: that is why wo's output is kept and not the stream behind it, their sum.

B batch, T tokens, C width, H heads, Hkv key/value heads, D head dim, F feed-forward width.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module

from .layers import CausalSelfAttention, FeedForward, Linear, RMSNorm, RotaryEmbedding, SwiGLU
from .ops._library import autocast_dtype, fake, kernel, single_backward
from .ops.attention import attention_bwd, attention_fwd
from .ops.linear import serves
from .ops.rmsnorm import rmsnorm_fwd, rmsnorm_residual_bwd, rmsnorm_residual_fwd
from .ops.rope import rope_rotate_qk
from .ops.swiglu import swiglu_bwd, swiglu_fwd


class _Weights(NamedTuple):
    """The parameters, in the order in which the forward meets them."""

    attention_norm: torch.Tensor  # (C,)
    wq: torch.Tensor              # (H D, C)
    wk: torch.Tensor              # (Hkv D, C)
    wv: torch.Tensor              # (Hkv D, C)
    wo: torch.Tensor              # (C, H D)
    ffn_norm: torch.Tensor        # (C,)
    w1: torch.Tensor              # (F, C)
    w3: torch.Tensor              # (F, C)
    w2: torch.Tensor              # (C, F)


class _Options(NamedTuple):
    attention_eps: float
    ffn_eps: float
    head_dim: int
    window: int                   # 0: none
    interleaved: bool
    lower: torch.dtype | None     # what autocast makes matrix products in


def _cast(x, dtype):
    return x if dtype is None else x.to(dtype)


def _add_norm(x, residual, weight, eps, lower):
    """rmsnorm_residual_fwd; under autocast in the wider of the two dtypes, as the public op."""
    wider = None if lower is None else torch.promote_types(x.dtype, residual.dtype)
    return rmsnorm_residual_fwd(_cast(x, wider), _cast(residual, wider), weight, eps)


def _forward(x, residual, cos, sin, weights, options):
    """(output, stream, *kept); kept ends with the sum x + residual where there is a residual."""
    w, (attention_eps, ffn_eps, D, window, interleaved, lower) = _Weights(*weights), options
    B, T, _ = x.shape
    if residual is None:
        y, stream, kept_stream = rmsnorm_fwd(x, w.attention_norm, attention_eps)[0], x, ()
    else:
        y, stream, _ = _add_norm(x, residual, w.attention_norm, attention_eps, lower)
        kept_stream = (stream,)
    y = _cast(y, lower)
    q, k, v = (F.linear(y, _cast(weight, lower)).view(B, T, -1, D)  # (B, T, H or Hkv, D)
               for weight in (w.wq, w.wk, w.wv))
    q, k = rope_rotate_qk(q, k, cos, sin, interleaved, False)
    o, lse = attention_fwd(q, k, v, D ** -0.5, True, window, None, None)
    a = F.linear(o.view(B, T, -1), _cast(w.wo, lower))
    y, stream, _ = _add_norm(a, stream, w.ffn_norm, ffn_eps, lower)
    y = _cast(y, lower)
    gate, up = F.linear(y, _cast(w.w1, lower)), F.linear(y, _cast(w.w3, lower))  # (B, T, F)
    output = F.linear(swiglu_fwd(gate, up), _cast(w.w2, lower))
    return output, stream, q, k, v, o, lse, a, gate, up, *kept_stream


def _rows(x):
    return x.reshape(-1, x.shape[-1])


def _weight_grad(dy, x, weight):
    return (_rows(dy).t() @ _rows(x)).to(weight.dtype)


def _input_grad(dys, weights, shape, lower):
    """The gradient of what all of `weights` were applied to."""
    dx = _rows(dys[0]) @ _cast(weights[0], lower)
    for dy, weight in zip(dys[1:], weights[1:]):  # not addmm_, which FlopCounterMode does not count
        torch.addmm(dx, _rows(dy), _cast(weight, lower), out=dx)
    return dx.view(shape)


def _backward(doutput, dstream, kept, cos, sin, weights, options, need):
    """The gradients of (x + residual, *weights) where `need` says so, in that order; the others are
    None and cost nothing."""
    q, k, v, o, lse, a, gate, up, h = kept
    w, (attention_eps, ffn_eps, D, window, interleaved, lower) = _Weights(*weights), options
    need_h, need_w = need[0], _Weights(*need[1:])
    grads = dict.fromkeys(_Weights._fields)
    # Each stage ends when nothing before it in the forward wants a gradient.
    if need_w.w2:
        grads["w2"] = _weight_grad(doutput, swiglu_fwd(gate, up), w.w2)
    if not any(need[:9]):
        return None, *grads.values()
    dproduct = _input_grad([doutput], [w.w2], gate.shape, lower)
    dgate, dup = swiglu_bwd(dproduct, gate, up)
    del dproduct

    y, stream, rstd = _add_norm(a, h, w.ffn_norm, ffn_eps, lower)
    y = _cast(y, lower)
    if need_w.w1:
        grads["w1"] = _weight_grad(dgate, y, w.w1)
    if need_w.w3:
        grads["w3"] = _weight_grad(dup, y, w.w3)
    if not any(need[:7]):
        return None, *grads.values()
    dy = _input_grad([dgate, dup], [w.w1, w.w3], h.shape, lower).to(stream.dtype)
    del dgate, dup
    dh, grads["ffn_norm"] = rmsnorm_residual_bwd(dy, dstream, stream, w.ffn_norm, rstd,
                                                 need_w.ffn_norm)
    del y, stream

    da = dh.to(a.dtype)
    if need_w.wo:
        grads["wo"] = _weight_grad(da, o.flatten(2), w.wo)
    if any(need[:5]):
        do = _input_grad([da], [w.wo], o.shape, lower)
        dq, dk, dv = attention_bwd(do, None, q, k, v, o, lse, D ** -0.5, True, window, None, None)
        dq, dk = rope_rotate_qk(dq, dk, cos, sin, interleaved, True)
        dqkv = [t.flatten(2) for t in (dq, dk, dv)]
        y, rstd = rmsnorm_fwd(h, w.attention_norm, attention_eps)
        y = _cast(y, lower)
        for name, dy in zip(("wq", "wk", "wv"), dqkv):
            if getattr(need_w, name):
                grads[name] = _weight_grad(dy, y, getattr(w, name))
        del y
        if any(need[:2]):
            dy = _input_grad(dqkv, [w.wq, w.wk, w.wv], h.shape, lower).to(h.dtype)
            dh, grads["attention_norm"] = rmsnorm_residual_bwd(dy, dh, h, w.attention_norm, rstd,
                                                               need_w.attention_norm)
    return dh if need_h else None, *(g if n else None for g, n in zip(grads.values(), need_w))


# torch.compile gets forward and backward as one operator each. It could trace them instead; but it
# would then find the norms and products of the backward equal to the forward's, and keep those.

@torch.library.custom_op("llama_ext::block_fwd", mutates_args=())
def _block_fwd(x: torch.Tensor, residual: torch.Tensor | None, cos: torch.Tensor,
               sin: torch.Tensor, weights: list[torch.Tensor], attention_eps: float,
               ffn_eps: float, head_dim: int, window: int, interleaved: bool,
               lower: torch.dtype | None) -> list[torch.Tensor]:
    options = attention_eps, ffn_eps, head_dim, window, interleaved, lower
    return list(_forward(x, residual, cos, sin, weights, options))


@_block_fwd.register_fake
def _(x, residual, cos, sin, weights, *options):
    return list(_forward(x, residual, cos, sin, weights, options))


@torch.library.custom_op("llama_ext::block_bwd", mutates_args=())
def _block_bwd(doutput: torch.Tensor, dstream: torch.Tensor, kept: list[torch.Tensor],
               cos: torch.Tensor, sin: torch.Tensor, weights: list[torch.Tensor],
               attention_eps: float, ffn_eps: float, head_dim: int, window: int, interleaved: bool,
               lower: torch.dtype | None, need: list[bool]) -> list[torch.Tensor]:
    options = attention_eps, ffn_eps, head_dim, window, interleaved, lower
    grads = _backward(doutput, dstream, kept, cos, sin, weights, options, need)
    return [g for g in grads if g is not None]


@_block_bwd.register_fake
def _(doutput, dstream, kept, cos, sin, weights, *options_and_need):
    wanted = [like for like, need in zip((kept[-1], *weights), options_and_need[-1]) if need]
    return [like.new_empty(like.shape) for like in wanted]


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, cos, sin, options, *weights):
        if torch.compiler.is_compiling():
            output, stream, *kept = _block_fwd(x, residual, cos, sin, list(weights), *options)
        else:
            output, stream, *kept = _forward(x, residual, cos, sin, weights, options)
        if residual is None:
            kept.append(x)
        ctx.save_for_backward(cos, sin, *weights, *kept)
        ctx.options = options
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        return output, stream

    @single_backward("block")
    def backward(ctx, doutput, dstream):
        cos, sin, *saved = ctx.saved_tensors
        weights, kept = saved[:9], saved[9:]
        need_x, need_residual, _, _, _, *need = ctx.needs_input_grad
        need = [need_x or need_residual, *need]
        with _no_autocast(doutput):
            if torch.compiler.is_compiling():
                grads = iter(_block_bwd(doutput, dstream, kept, cos, sin, weights, *ctx.options,
                                        need))
                dx, *dweights = [next(grads) if n else None for n in need]
            else:
                dx, *dweights = _backward(doutput, dstream, kept, cos, sin, weights, ctx.options,
                                          need)
        x_dtype, residual_dtype = ctx.dtypes
        return (dx.to(x_dtype) if need_x else None,
                dx.to(residual_dtype) if need_residual else None, None, None, None, *dweights)


def _no_autocast(x):
    """The backward's dtypes are the forward's, whatever is active where backward() is called."""
    return (contextlib.nullcontext() if autocast_dtype(x) is None else
            torch.autocast(x.device.type, enabled=False))


def why_composed(block):
    """Why this TransformerBlock runs as a composition of its modules, one sentence; None when it
    runs as the one function with the hand-written backward.

    It does the latter while gradients are recorded and its parts are what TransformerBlock made:
    the function reads their weights and does not call them, so that a part with a hook, with a
    forward of its own, of another class, or with weights that are no plain tensors (DTensor,
    quantised) is called as ever. Under fully_shard the weights are plain inside the block's forward
    only. Global module hooks are no reason: they see the block, not its parts. A call with a KV
    cache is composed, or one operator without gradients (runs_as_one_operator).
    """
    if not torch.is_grad_enabled():
        return "no gradients are recorded"
    return _why_its_parts_are_called(block)


def _why_its_parts_are_called(block):
    modules = block._modules  # much faster than getattr
    for (parent, name), expected in _PARTS.items():
        part = (modules[parent]._modules if parent else modules)[name]
        own = part.__dict__
        parameters = own["_parameters"]
        weight = parameters.get("weight", own.get("weight"))
        if why := _why_it_is_called(part, expected):
            pass
        elif parameters.get("bias", own.get("bias")) is not None:
            why = " has a bias"
        elif type(weight) not in _PLAIN:
            why = f".weight is a {type(weight).__name__}"
        else:
            continue
        return (f"{parent}.{name}" if parent else name) + why
    return None


def _why_it_is_called(module, expected):
    own = module.__dict__
    if type(module) is not expected:
        return f" is a {type(module).__name__}, not a {expected.__name__}"
    if (own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
            or own["_backward_pre_hooks"]):
        return " has a hook"
    return " has a forward of its own" if "forward" in own else None


_PARTS = {
    ("", "attention"): CausalSelfAttention, ("attention", "wq"): Linear,
    ("attention", "wk"): Linear, ("attention", "wv"): Linear, ("attention", "wo"): Linear,
    ("attention", "rotary"): RotaryEmbedding, ("", "feed_forward"): FeedForward,
    ("feed_forward", "w1"): Linear, ("feed_forward", "w2"): Linear, ("feed_forward", "w3"): Linear,
    ("feed_forward", "swiglu"): SwiGLU, ("", "attention_norm"): RMSNorm, ("", "ffn_norm"): RMSNorm}
_PLAIN = nn.Parameter, torch.Tensor, type(None)


def fused_block(block, x, residual=None, start_pos=0):
    """TransformerBlock.forward(x, residual, start_pos) as one autograd function.

    x, residual: (B, T, C), residual None in the first layer. Returns (output, stream), both
    (B, T, C). Under autocast matrix products and attention are made in its dtype, and weights are
    cast anew in the backward instead of being kept. For blocks of which why_composed() is None.
    Raises ValueError for an x that is not (B, T, C), RuntimeError for shapes, dtypes or devices
    that do not fit, and for a double backward.
    """
    attention = block.attention
    if x.dim() != 3:
        raise ValueError(f"TransformerBlock: x: expected (B, T, {attention.wq.in_features}), got "
                         f"shape {tuple(x.shape)}")
    lower = None if x.dtype == torch.float64 else autocast_dtype(x)
    cos, sin = attention.rotary.tables(x.shape[1], start_pos, dtype=lower or x.dtype)
    options = _Options(block.attention_norm.eps, block.ffn_norm.eps, attention.head_dim,
                       attention.window or 0, attention.rotary.interleaved, lower)
    return _Block.apply(x, residual, cos, sin, options, *_weights(block))


def _weights(block):
    own = block._modules  # much faster than getattr
    attention, feed_forward = own["attention"]._modules, own["feed_forward"]._modules
    return _Weights(own["attention_norm"].weight, attention["wq"].weight, attention["wk"].weight,
                    attention["wv"].weight, attention["wo"].weight, own["ffn_norm"].weight,
                    feed_forward["w1"].weight, feed_forward["w3"].weight,
                    feed_forward["w2"].weight)


_blocks_cached = kernel("blocks_cached")


@fake("blocks_cached")
def _(x, *args):
    return torch.empty_like(x), torch.empty_like(x)


def runs_as_one_operator(block, x):
    """Whether cached_blocks() may stand for this TransformerBlock's forward on x (1, N, C), a few
    tokens on the CPU: without gradients and autocast, all parts what TransformerBlock made."""
    return (serves(x) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and _why_its_parts_are_called(block) is None)


def all_run_as_one_operator(blocks, expected, x):
    """Whether cached_blocks() may stand for calls of these blocks, one after the other on x: each
    runs_as_one_operator(), all have the same options, and calling one, of the class `expected`,
    does no more than its forward."""
    def options(attention):
        return attention.head_dim, attention.window, attention.rotary
    first = options(blocks[0].attention)
    return (runs_as_one_operator(blocks[0], x)
            and not nn_module._global_forward_hooks
            and not nn_module._global_forward_pre_hooks
            and all(_why_it_is_called(block, expected) is None
                    and block._compiled_call_impl is None and options(block.attention) == first
                    and _why_its_parts_are_called(block) is None for block in blocks))


def cached_blocks(blocks, x, residual, rows, k, v):
    """TransformerBlock.forward(x, residual, rows, cache) of one block after the other as one
    operator, for a CacheRows and caches k, v (blocks, B, S, Hkv, D): the same kernels, without a
    visit to Python between them."""
    attention = blocks[0].attention
    return _blocks_cached(
        x, residual, [weight for block in blocks for weight in _weights(block)],
        [norm.eps for block in blocks for norm in (block.attention_norm, block.ffn_norm)],
        attention.head_dim, attention.window or 0, attention.rotary.interleaved,
        *rows.tables(attention.rotary, x.dtype), k.flatten(1, 2), v.flatten(1, 2), rows.slots,
        *rows.cu_seqlens)
