"""Who computes an op: ours, torch in its several ways, and other packages' kernels.

An adapter takes a Case and a dtype and returns a function of the case's inputs, or raises Unfit
with the reason why this provider does not do that case. Packages are imported where one is needed.
Whatever a provider does to its inputs, it does to its own copy of them.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import llama_ext as lx
from llama_ext.errors import LlamaExtError

from . import result

EPS = 1e-6
SCORES = 1 << 27  # elements of a score matrix up to which it is held whole


class Unfit(Exception):
    """Why a provider does not do a case."""


def _expect(ok, reason):
    if not ok:
        raise Unfit(reason)


def _sixteen_bits(dtype):
    _expect(dtype.itemsize == 2, "bf16 and fp16 only")


def _self_attention(case):
    _expect(case.options["T"] == case.options["S"], "not one query over a cache")


def _equal_heads(case):
    _expect(case.options["H"] == case.options["Hkv"], "no grouped heads")


def _halves(case):
    _expect(not case.options["interleaved"], "Hugging Face's layout only")


def _whole_scores(case):
    _expect(case.options["scores"] <= SCORES, "holds the whole score matrix")


# --- torch ---

def complex_rope(x, cos, sin):
    """Meta's own, for x (B, T, H, D), pairs 2i, 2i+1; cos, sin (T, D/2), fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)[:, None]).flatten(-2).to(x.dtype)


def _rotate_half(x, cos, sin):
    c, s = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * c + torch.cat((-b, a), -1) * s


def _rmsnorm_builtin(x, w):
    return F.rms_norm(x, w.shape, w, EPS)


def _rmsnorm_residual_builtin(x, residual, w):
    h = x + residual
    return F.rms_norm(h, w.shape, w, EPS), h


def _swiglu_builtin(gate, up):
    return F.silu(gate) * up


def _cross_entropy_builtin(logits, target):
    return F.cross_entropy(logits.float(), target)


def _linear_cross_entropy_builtin(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def _by_hand(case, dtype):
    return complex_rope if case.options["interleaved"] else _rotate_half


def _attention_eager(case, dtype):
    _whole_scores(case)
    return lx.ref.attention


def _sdpa(case, dtype, backend=None):
    o = case.options

    def run(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            out = _sdpa_call(q, k, v)
        else:
            with sdpa_kernel(backend):
                out = _sdpa_call(q, k, v)
        return out.transpose(1, 2)

    def _sdpa_call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=o["T"] == o["S"],
                                              enable_gqa=o["H"] != o["Hkv"])
    return run


def _sdpa_by(backend, case, dtype):
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        _equal_heads(case)
    else:
        _sixteen_bits(dtype)
    return _sdpa(case, dtype, backend)


def _same(fn):
    """The adapter of a function that takes the inputs as they are."""
    return lambda case, dtype: fn


def _full_weights(case, dtype):
    return lambda x, weight, scale, full: F.linear(x, full)


OURS = {
    "rmsnorm": _same(lambda x, w: lx.rmsnorm(x, w, EPS)),
    "rmsnorm_residual": _same(lambda x, residual, w: lx.rmsnorm_residual(x, residual, w, EPS)),
    "swiglu": _same(lx.swiglu),
    "rope": lambda case, dtype: functools.partial(lx.rope, interleaved=case.options["interleaved"]),
    "attention": _same(lx.attention),
    "cross_entropy": _same(lx.cross_entropy),
    "linear_cross_entropy": _same(lx.linear_cross_entropy),
    "linear_int8": _same(lambda x, weight, scale, full: lx.linear_int8(x, weight, scale)),
}
EAGER = {
    "rmsnorm": _same(lambda x, w: lx.ref.rmsnorm(x, w, EPS)),
    "rmsnorm_residual": _same(lambda x, residual, w: lx.ref.rmsnorm_residual(x, residual, w, EPS)),
    "swiglu": _same(lx.ref.swiglu),
    "rope": _by_hand,
    "attention": _attention_eager,
    "cross_entropy": _same(lx.ref.cross_entropy),
    "linear_cross_entropy": _same(lx.ref.linear_cross_entropy),
    "linear_int8": _same(lambda x, weight, scale, full: lx.ref.linear_int8(x, weight, scale)),
}
BUILTIN = {
    "rmsnorm": _same(_rmsnorm_builtin), "rmsnorm_residual": _same(_rmsnorm_residual_builtin),
    "swiglu": _same(_swiglu_builtin), "attention": _sdpa,
    "cross_entropy": _same(_cross_entropy_builtin),
    "linear_cross_entropy": _same(_linear_cross_entropy_builtin),
    "linear_int8": _full_weights,
}
# What is compiled: for each op the one of eager and built-in whose code the compiler makes faster.
COMPILED = EAGER | {name: BUILTIN[name] for name in ("swiglu", "cross_entropy",
                                                     "linear_cross_entropy")}


def _compiled(case, dtype):
    if case.op == "rope" and case.options["interleaved"]:  # complex numbers are not compiled
        return torch.compile(lx.ref.rope, dynamic=False)
    return torch.compile(COMPILED[case.op](case, dtype), dynamic=False)


# --- other packages ---

def _flash_attn_attention(case, dtype):
    from flash_attn import flash_attn_func
    _sixteen_bits(dtype)
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def _flash_attn_rmsnorm(case, dtype):
    from flash_attn.ops.triton.layer_norm import rms_norm_fn
    return lambda x, w: rms_norm_fn(x, w, None, eps=EPS)


def _flash_attn_rmsnorm_residual(case, dtype):
    from flash_attn.ops.triton.layer_norm import rms_norm_fn
    return lambda x, residual, w: rms_norm_fn(x, w, None, residual=residual, eps=EPS, prenorm=True)


def _flash_attn_swiglu(case, dtype):
    from flash_attn.ops.activations import swiglu
    return swiglu


def _flash_attn_rope(case, dtype):
    from flash_attn.layers.rotary import apply_rotary_emb
    interleaved = case.options["interleaved"]
    return lambda x, cos, sin: apply_rotary_emb(x, cos.to(x.dtype), sin.to(x.dtype),
                                                interleaved=interleaved)


def _flash_attn_cross_entropy(case, dtype):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    return lambda logits, target: cross_entropy_loss(logits, target)[0].mean()


def _liger(name, call):
    """The adapter of one of liger_kernel.transformers.functional's, called as call(it) says."""
    def make(case, dtype):
        functional = importlib.import_module("liger_kernel.transformers.functional")
        _expect(hasattr(functional, name), f"this version has no {name}")
        return call(getattr(functional, name))
    return make


def _liger_rope(case, dtype):
    from liger_kernel.transformers.functional import liger_rope
    _halves(case)

    def run(x, cos, sin):  # liger rotates queries and keys together: a head of keys is the least
        c, s = (torch.cat((t, t), -1)[None] for t in (cos, sin))  # (1, T, D)
        x = x.transpose(1, 2)
        return liger_rope(x, x[:, :1].detach(), c, s)[0].transpose(1, 2)
    return run


def _xformers_attention(case, dtype):
    from xformers.ops import LowerTriangularMask, memory_efficient_attention
    _self_attention(case), _equal_heads(case)
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())


def _apex_rmsnorm(case, dtype):
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
    return lambda x, w: fused_rms_norm_affine(x, w, w.shape, eps=EPS)


def _transformer_engine_rmsnorm(case, dtype):
    from transformer_engine.pytorch import RMSNorm
    norm = RMSNorm(int(case.shape.split()[-1]), eps=EPS, device="cuda", dtype=dtype)
    return lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,))


def _transformer_engine_attention(case, dtype):
    from transformer_engine.pytorch import DotProductAttention
    _sixteen_bits(dtype), _self_attention(case)
    o = case.options
    attention = DotProductAttention(o["H"], o["D"], num_gqa_groups=o["Hkv"], attention_dropout=0.0,
                                    qkv_format="bshd", attn_mask_type="causal")
    return lambda q, k, v: attention(q, k, v).unflatten(-1, (o["H"], o["D"]))


@dataclass(frozen=True)
class Provider:
    """ops: {op: adapter}; module: what must be importable; cuda: it runs on CUDA devices only."""

    name: str
    ops: dict[str, Callable]
    module: str = "torch"
    cuda: bool = False

    def missing(self, device):
        """Why it cannot run on "cpu" or "cuda" here, or None."""
        try:
            importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name == self.module:
                return "not installed"
            return f"its import fails: {result.sentence(error)}"
        except Exception as error:  # a binary of another torch, a driver that is not there, ...
            return f"its import fails: {result.sentence(error)}"
        return "needs CUDA" if self.cuda and device != "cuda" else None

    def version(self):
        module = importlib.import_module(self.module)
        return str(getattr(module, "__version__", "unknown"))


SDPA = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION}
PROVIDERS = {provider.name: provider for provider in (
    Provider("llama_ext", OURS, "llama_ext"),
    Provider("eager", EAGER),
    Provider("built-in", BUILTIN),
    Provider("compile", dict.fromkeys(COMPILED, _compiled)),
    *(Provider(name, {"attention": functools.partial(_sdpa_by, backend)}, cuda=True)
      for name, backend in SDPA.items()),
    Provider("flash-attn", {
        "attention": _flash_attn_attention, "rmsnorm": _flash_attn_rmsnorm,
        "rmsnorm_residual": _flash_attn_rmsnorm_residual, "swiglu": _flash_attn_swiglu,
        "rope": _flash_attn_rope, "cross_entropy": _flash_attn_cross_entropy},
        "flash_attn", cuda=True),
    Provider("liger", {
        "rmsnorm": _liger("liger_rms_norm", lambda fn: lambda x, w: fn(x, w, EPS)),
        "rmsnorm_residual": _liger("liger_fused_add_rms_norm",
                                   lambda fn: lambda x, residual, w: fn(x, residual, w, EPS)),
        "swiglu": _liger("liger_swiglu", lambda fn: fn), "rope": _liger_rope,
        "cross_entropy": _liger("liger_cross_entropy", lambda fn: fn),
        "linear_cross_entropy": _liger("liger_fused_linear_cross_entropy", lambda fn: fn)},
        "liger_kernel", cuda=True),
    Provider("xformers", {"attention": _xformers_attention}, "xformers", cuda=True),
    Provider("apex", {"rmsnorm": _apex_rmsnorm}, "apex", cuda=True),
    Provider("transformer-engine", {
        "rmsnorm": _transformer_engine_rmsnorm, "attention": _transformer_engine_attention},
        "transformer_engine", cuda=True),
)}


def chosen(peers):
    """Names: ours and those of `peers`, or all. Raises LlamaExtError for an unknown one."""
    known = list(PROVIDERS)[1:]
    for name in peers or []:
        if name not in known:
            raise LlamaExtError(f"--peers: expected some of {', '.join(known)}, got {name}")
    return [list(PROVIDERS)[0], *(name for name in known if name in (peers or known))]
