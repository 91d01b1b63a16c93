"""The transformer block's one autograd function: against its definition, against the composition of
the ops, and what it keeps, computes and refuses."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import compare
import llama_ext as lx
from harness import DTYPES, check_op, randn, scattered, transposed
from llama_ext import block as block_module
from llama_ext.block import why_composed
from llama_ext.layers import RotaryEmbedding
from llama_ext.model import LlamaConfig, TransformerBlock

B, T = 3, 37
CONFIG = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=96, max_seq_len=64,
                     norm_eps=1e-5, rope_theta=100.0)
NAMES = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
         "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]


def make(dtype=torch.float32, window=None, config=CONFIG):
    """A block whose every weight matters: matrices that keep variance, norms about 1."""
    rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_seq_len)
    block = TransformerBlock(config, rotary)
    with torch.no_grad():
        for p in block.parameters():
            norm = p.dim() == 1
            p.copy_(randn(*p.shape, mean=float(norm), scale=0.3 if norm else p.shape[1] ** -0.5))
    block.attention.window, block.attention_norm.eps = window, 0.1
    return block.to(dtype)


def weights(block):
    return [block.get_parameter(f"{name}.weight") for name in NAMES]


def inputs(dtype=torch.float32, first=False, config=CONFIG):
    x = randn(B, T, config.dim, dtype=dtype)
    return (x, None) if first else (x, randn(B, T, config.dim, dtype=dtype))


def called(block):
    """The block as a function of (x, residual, *weights)."""
    def fn(x, residual, *tensors):
        named = {f"{name}.weight": t for name, t in zip(NAMES, tensors)}
        return functional_call(block, named, (x, residual))
    return fn


def defined(block):
    """The same by the plain formulas of llama_ext.ref."""
    heads, window = block.attention.head_dim, block.attention.window

    def fn(x, residual, norm1, wq, wk, wv, wo, norm2, w1, w3, w2):
        h = x if residual is None else x + residual
        y = lx.ref.rmsnorm(h, norm1, block.attention_norm.eps)
        q, k, v = (F.linear(y, w).unflatten(-1, (-1, heads)) for w in (wq, wk, wv))
        cos, sin = block.attention.rotary.tables(x.shape[1])
        q, k = lx.ref.rope_qk(q, k, cos, sin)
        a = F.linear(lx.ref.attention(q, k, v, window=window).flatten(2), wo)
        y, h = lx.ref.rmsnorm_residual(a, h, norm2, block.ffn_norm.eps)
        return F.linear(lx.ref.swiglu(F.linear(y, w1), F.linear(y, w3)), w2), h
    return fn


def composed(block, *args):
    """The block as a composition of its modules: a hook on one of them asks for that."""
    handle = block.attention.register_forward_hook(lambda *_: None)
    try:
        assert why_composed(block) is not None
        return block(*args)
    finally:
        handle.remove()


def total(outputs, seed=1):
    """A scalar with a random, non-uniform gradient."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
               for o in outputs)


def results(fn, block, args):
    """Outputs of fn(block, *args) and the gradients of args and weights by name."""
    args = [a if a is None else a.detach().clone().requires_grad_() for a in args]
    block.zero_grad()
    outputs = fn(block, *args)
    total(outputs).backward()
    grads = dict(zip(["x", "residual", *NAMES], [*args, *weights(block)]))
    return outputs, {name: t.grad for name, t in grads.items() if t is not None}


def direct(block, *args):
    assert why_composed(block) is None
    return block(*args)


# --- values ---

@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_definition(dtype, window, first):
    block = make(dtype, window)
    assert why_composed(block) is None
    check_op(called(block), defined(block), *inputs(dtype, first), *weights(block), dtype=dtype,
             fp32_roundings=12)  # the path through a block rounds that often and more


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_gradcheck(first):
    config = LlamaConfig(dim=4, n_layers=1, n_heads=2, n_kv_heads=1, hidden_dim=6, max_seq_len=8)
    block = make(torch.float64, config=config)
    args = [t if t is None else t[:2, :3].clone().requires_grad_()
            for t in inputs(torch.float64, first, config)]
    assert torch.autograd.gradcheck(called(block), (*args, *weights(block)),
                                    fast_mode=True)


@pytest.mark.parametrize("head_dim", [6, 40])
def test_head_dim_of_its_own(head_dim):
    """Less and more than dim / n_heads."""
    config = dataclasses.replace(CONFIG, head_dim=head_dim)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        block, args = make(dtype, config=config), inputs(dtype)
        assert block.attention.wo.weight.shape == (64, 4 * head_dim)
        if dtype.itemsize > 2:  # else luck decides: one wrong bias in ten, by as many roundings
            check_op(called(block), defined(block), *args, *weights(block), dtype=dtype,
                     fp32_roundings=12)
        got, base = (results(fn, block, args)[0] for fn in (direct, composed))
        assert all(map(torch.equal, got, base))
    assert kept_bytes(direct, block, *args) == B * T * per_token(config, 4)


def one_by_one(dys, ws, shape, lower):
    """block._input_grad with the roundings that autograd's sum of the composition has."""
    products = [(dy.flatten(0, -2) @ block_module._cast(w, lower)).view(shape)
                for dy, w in zip(dys, ws)]
    if lower is not None and len(products) > 1:
        products = [p.float() for p in products]
    return sum(products[::-1][1:], products[-1])


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("mode", ["bf16", "fp16", "fp32", "fp64", "autocast"])
def test_is_bitwise_the_composition(monkeypatch, mode, first):
    """But for the sum of gradients that meet at one tensor, which rounds less often here."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}.get(
        mode, torch.float32)
    block, args = make(dtype), inputs(dtype, first)
    if mode == "autocast" and not first:
        args = args[0].bfloat16(), args[1]

    def run(fn):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16,
                            enabled=mode == "autocast"):
            return results(fn, block, args)
    base, base_grads = run(composed)
    got, grads = run(direct)
    for g, b in zip(got, base):
        assert g.dtype == b.dtype and torch.equal(g, b)
    for name in ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"):
        assert torch.equal(grads[name], base_grads[name])
    monkeypatch.setattr(block_module, "_input_grad", one_by_one)
    _, grads = run(direct)
    for name, g in grads.items():
        assert g.dtype == base_grads[name].dtype
        assert (first and name == "x") or torch.equal(g, base_grads[name]), name


def test_autocast_is_as_exact_as_the_composition():
    block, args = make(), inputs()
    args = args[0].bfloat16(), args[1]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        _, base = results(composed, block, args)
        _, got = results(direct, block, args)
    exact = copy.deepcopy(block).double()
    _, ref = results(direct, exact, [a.double() for a in args])
    for name, g in got.items():
        compare.check(g, ref[name], base[name], torch.bfloat16, name)


def test_strided_inputs_and_cotangents():
    block, args = make(), inputs()
    outputs, grads = results(direct, block, args)
    leaves = [scattered(transposed(a)).requires_grad_() for a in args]
    block.zero_grad()
    got = block(*leaves)
    total([o.transpose(0, 2).contiguous().transpose(0, 2) for o in got]).backward()
    assert all(torch.equal(g, o) for g, o in zip(got, outputs))
    for name, t in zip(["x", "residual", *NAMES], [*leaves, *weights(block)]):
        assert torch.equal(t.grad, grads[name]), name


@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_output_has_gradient_zero(unused):
    block, args = make(), [a.requires_grad_() for a in inputs()]
    def grads(fn):
        return torch.autograd.grad(fn(block, *args)[1 - unused].square().sum(), args)
    for g, e in zip(grads(direct), grads(composed)):
        compare.check(g, e.double(), e, fp32_roundings=12)


def test_backward_again_gives_the_same_and_writes_no_input():
    block, args = make(), [a.requires_grad_() for a in inputs()]
    leaves = [*args, *weights(block)]
    before = [t.detach().clone() for t in leaves]
    loss = total(block(*args))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for _ in range(5):
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, f) for a, f in zip(again, first))
    assert all(torch.equal(t, b) for t, b in zip(leaves, before))


# --- what it keeps and computes ---

def kept_bytes(fn, block, x, residual):
    """Bytes that a forward keeps for the backward, each storage once, parameters and tables not."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = fn(block, x, residual)
    for t in (*block.parameters(), *block.buffers()):
        sizes.pop(t.untyped_storage().data_ptr(), None)
    del outputs
    return sum(sizes.values())


def per_token(config, width):
    """Numbers kept per token by width, in bytes of bf16 data: `width` C-wide tensors, two of which
    (queries, attention's output) are as wide as all heads."""
    heads = 2 * config.q_dim + 2 * config.kv_dim
    return 2 * ((width - 2) * config.dim + heads + 2 * config.hidden_dim) + 4 * config.n_heads


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_kept_bytes_in_bf16(first):
    block = make(torch.bfloat16)
    args = [t if t is None else t.requires_grad_() for t in inputs(torch.bfloat16, first)]
    assert kept_bytes(direct, block, *args) == B * T * per_token(CONFIG, 4)
    assert kept_bytes(composed, block, *args) > B * T * per_token(CONFIG, 5)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_kept_bytes_under_autocast(first):
    """The stream is fp32, which takes the place of a fifth tensor; no cast weight is kept."""
    block, (x, residual) = make(), inputs(first=first)
    x = x if first else x.bfloat16()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        assert kept_bytes(direct, block, x, residual) == B * T * per_token(CONFIG, 5)


class Calls(TorchDispatchMode):
    """Counts what matters of the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0].rstrip("_")
        if name in ("mm", "addmm", "bmm", "attention_fwd", "attention_bwd"):
            self.counts["mm" if name.endswith("mm") else name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_flop_counter_sees_every_product(autocast):
    block, (x, residual) = make(), inputs()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        with FlopCounterMode(display=False) as counter:
            total(block(x.requires_grad_(), residual)).backward()
    matrices = sum(w.numel() for w in weights(block) if w.dim() == 2)
    assert counter.get_total_flops() == 3 * 2 * B * T * matrices


MATRICES = [i for i, name in enumerate(NAMES) if "norm" not in name]
# For each weight, how many input gradients its own needs: those of the matrices behind it.
BEHIND = dict(zip(NAMES, [7, 4, 4, 4, 3, 3, 1, 1, 0]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trained", [
    ["x", *NAMES], NAMES, ["x"], *([name] for name in NAMES),
    *(["x", *NAMES[:i], *NAMES[i + 1:]] for i in range(len(NAMES))), [*NAMES[1:], "residual"]],
    ids=lambda names: "+".join(names) if len(names) == 1 else
    "all but " + "+".join(n for n in ["x", "residual", *NAMES] if n not in names))
def test_frozen_parts_cost_no_matrix_product(trained, autocast):
    block, args = make(), inputs()
    _, expected = results(direct, block, args)
    leaves = dict(zip(["x", "residual", *NAMES], [*(a.clone() for a in args), *weights(block)]))
    for name, t in leaves.items():
        t.grad = None
        t.requires_grad_(name in trained)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
        with Calls() as forward:
            outputs = block(leaves["x"], leaves["residual"])
    with Calls() as backward:
        total(outputs).backward()
    assert forward.counts == {"mm": 7, "attention_fwd": 1}
    upstream = 7 if {"x", "residual"} & set(trained) else max(BEHIND[name] for name in trained)
    of_weights = sum(NAMES[i] in trained for i in MATRICES)
    assert backward.counts["mm"] == upstream + of_weights
    assert backward.counts["attention_bwd"] == (upstream > 3)
    assert not backward.counts["attention_fwd"]
    for name, t in leaves.items():
        if name not in trained:
            assert t.grad is None
        elif not autocast:
            assert torch.equal(t.grad, expected[name])
