"""When a transformer block is one autograd function, and how that works inside other machinery."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import compare
import llama_ext as lx
from llama_ext import block as block_module
from llama_ext.block import why_composed
from llama_ext.layers import RotaryEmbedding
from llama_ext.model import KVCache
from test_block import (B, CONFIG, NAMES, T, composed, direct, inputs, make, results, total,
                        weights)

# --- when it is used ---

class Narrow(nn.Linear):
    """A stand-in for LoRA and quantised layers."""


def replace(name, to):
    def change(block):
        block.set_submodule(name, to(block.get_submodule(name)))
    return change


def narrow(linear):
    new = Narrow(linear.in_features, linear.out_features, bias=False)
    new.weight = linear.weight
    return new


class ScaledNorm(lx.layers.RMSNorm):
    """A norm of the user's own."""


def scaled_norm(norm):
    new = ScaledNorm(CONFIG.dim, norm.eps)
    new.weight = norm.weight
    return new


def add_bias(linear):
    linear.bias = nn.Parameter(torch.ones(linear.out_features))
    return linear


def own_forward(module):
    module.forward = module.forward
    return module


class Tagged(torch.Tensor):
    """A tensor subclass, as DTensor is one."""


def subclass(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Tagged))
    return linear


def hooked(kind):
    return lambda block: getattr(block.feed_forward.w1, kind)(lambda *_: None)


@pytest.mark.parametrize("change, reason", [
    (replace("attention.wq", narrow), "attention.wq is a Narrow, not a Linear"),
    (replace("feed_forward.w2", narrow), "feed_forward.w2 is a Narrow, not a Linear"),
    (replace("feed_forward.w3", add_bias), "feed_forward.w3 has a bias"),
    (replace("attention_norm", own_forward), "attention_norm has a forward of its own"),
    (replace("attention.rotary", own_forward), "attention.rotary has a forward of its own"),
    (replace("ffn_norm", scaled_norm), "ffn_norm is a ScaledNorm, not a RMSNorm"),
    (replace("attention.wo", subclass), "attention.wo.weight is a Tagged"),
    (hooked("register_forward_hook"), "feed_forward.w1 has a hook"),
    (hooked("register_forward_pre_hook"), "feed_forward.w1 has a hook"),
    (hooked("register_full_backward_hook"), "feed_forward.w1 has a hook"),
    (hooked("register_full_backward_pre_hook"), "feed_forward.w1 has a hook")])
def test_changed_parts_are_called(monkeypatch, change, reason):
    block, args = make(), inputs()
    expected = block(*args)
    change(block)
    assert why_composed(block) == reason
    monkeypatch.setattr("llama_ext.model.fused_block", None)  # a call of it would fail
    outputs = block(*args)
    if "bias" not in reason:
        assert all(torch.equal(o, e) for o, e in zip(outputs, expected))
    total(outputs).backward()
    assert all(p.grad is not None for p in block.parameters())


def test_generation_is_composed(monkeypatch):
    block, (x, residual) = make(), inputs()
    expected = block(x, residual, 3)
    monkeypatch.setattr("llama_ext.model.fused_block", None)
    with torch.no_grad():
        assert why_composed(block) == "no gradients are recorded"
        assert torch.equal(block(x, residual, 3)[0], expected[0])
    assert why_composed(block) is None
    cache = KVCache(CONFIG, B)
    with torch.no_grad():
        got = block(x, residual, 0, (cache.k[0], cache.v[0]))
    assert not got[0].requires_grad


def test_a_model_trains_through_it(monkeypatch):
    calls = []
    def counted(*args):
        calls.append(1)
        return block_module.fused_block(*args)
    monkeypatch.setattr("llama_ext.model.fused_block", counted)
    model = lx.Llama(lx.LlamaConfig(dim=32, n_layers=3, n_heads=2, vocab_size=17, hidden_dim=48))
    tokens = torch.randint(17, (B, T))
    loss = model(tokens, tokens)
    assert len(calls) == 3
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    for layer in model.layers:
        layer.attention.register_forward_hook(lambda *_: None)
    model.zero_grad()
    assert torch.equal(model(tokens, tokens), loss) and len(calls) == 3
    model(tokens, tokens).backward()
    for p, g in zip(model.parameters(), grads):
        compare.check(g, p.grad.double(), p.grad, fp32_roundings=36)


# --- inside other machinery ---

@pytest.mark.parametrize("mode", ["bf16", "fp32", "autocast"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_compiles_to_one_graph(mode, first):
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    block, args = make(dtype), inputs(dtype, first)
    operators = []

    def backend(graph, example_inputs):
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16,
                        enabled=mode == "autocast"):
        expected, grads = results(direct, block, args)
        got, compiled_grads = results(lambda _, *a: compiled(*a), block, args)
    assert sum("block_fwd" in op for op in operators) == 1
    assert sum("block_bwd" in op for op in operators) == 1
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    for name, g in compiled_grads.items():
        assert g.dtype == grads[name].dtype and torch.equal(g, grads[name]), name


def test_compiles_with_frozen_weights_and_dynamic_length():
    block = make()
    block.attention.wq.requires_grad_(False)
    block.ffn_norm.requires_grad_(False)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(*inputs())
    with torch.compiler.set_stance("fail_on_recompile"):
        short = [a[:, :12].contiguous() for a in inputs()]
        total(compiled(*short)).backward()
    got = [p.grad for p in block.parameters()]
    block.zero_grad()
    total(block(*short)).backward()
    for p, g in zip(block.parameters(), got):
        assert g is None if p.grad is None else torch.equal(g, p.grad)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_operators_pass_opcheck(first):
    block, (x, residual) = make(), inputs(first=first)
    cos, sin = block.attention.rotary.tables(T)
    tensors = [w.detach() for w in weights(block)]
    options = 1e-5, 1e-5, 16, 0, True, None
    args = x, residual, cos, sin, tensors, *options
    torch.library.opcheck(torch.ops.llama_ext.block_fwd.default, args)
    output, stream, *kept = torch.ops.llama_ext.block_fwd(*args)
    kept += [x] if first else []
    for need in ([True] * 10, [True] + [False] * 8 + [True]):
        torch.library.opcheck(torch.ops.llama_ext.block_bwd.default,
                              (output, stream, kept, cos, sin, tensors, *options, need))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    block, args = make(), inputs()
    expected, grads = results(direct, block, args)
    got, again = results(lambda block, *a: checkpoint(block, *a, use_reentrant=reentrant), block,
                         args)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))
    assert all(torch.equal(g, grads[name]) for name, g in again.items())


def test_autocast_around_the_backward_changes_nothing():
    block, args = make(), [a.requires_grad_() for a in inputs()]
    loss = total(block(*args))
    expected = torch.autograd.grad(loss, args, retain_graph=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got = torch.autograd.grad(loss, args)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


def test_autocast_leaves_float64_alone():
    block, args = make(torch.float64), inputs(torch.float64)
    expected, _ = results(direct, block, args)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        got, _ = results(direct, block, args)
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


@pytest.mark.parametrize("autocast", [False, True])
def test_weights_shared_between_blocks(autocast):
    """Also with a composed block in the same autocast region, which caches its cast weights."""
    first, second, args = make(), make(), inputs()
    for name in NAMES:
        second.get_submodule(name).weight = first.get_submodule(name).weight
    second.attention.register_forward_hook(lambda *_: None)

    def grads(blocks, y):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
            for block in blocks:
                y = block(*y)
        return torch.autograd.grad(total(y), weights(blocks[0]))
    base = grads([second, second], args)
    once, mixed = grads([first, first], args), grads([first, second], args)
    ref = grads([first.double()] * 2, [a.double() for a in args])
    for got in (once, mixed):
        for g, r, b in zip(got, ref, base):
            compare.check(g, r, b, torch.bfloat16 if autocast else torch.float32,
                          fp32_roundings=24)


def test_one_weight_in_two_places():
    block, args = make(), inputs()
    block.feed_forward.w3.weight = block.feed_forward.w1.weight
    expected = results(composed, block, args)[1]["feed_forward.w1"]
    got = results(direct, block, args)[1]["feed_forward.w1"]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("start_pos", [0, 5])
def test_start_pos_and_tables_that_grow(start_pos):
    block, args = make(), inputs()
    grown = RotaryEmbedding(CONFIG.dim // CONFIG.n_heads, 100.0, 8)
    expected = composed(block, *args, start_pos)
    block.attention.rotary = grown
    assert torch.equal(direct(block, *args, start_pos)[0], expected[0])
    assert len(grown.cos) >= T + start_pos


def test_meta_tensors():
    block = make().to("meta")
    outputs = block(*(a.to("meta").requires_grad_() for a in inputs()))
    torch.autograd.backward(outputs, [torch.empty_like(o) for o in outputs])
    assert all(p.grad.shape == p.shape for p in block.parameters())


# --- errors ---

def test_double_backward_raises():
    block, args = make(), [a.requires_grad_() for a in inputs()]
    with pytest.raises(RuntimeError, match="^block: backward: expected create_graph=False"):
        torch.autograd.grad(total(block(*args)), args, create_graph=True)


def test_inputs_that_do_not_fit():
    block, (x, residual) = make(), inputs()
    with pytest.raises(ValueError, match=r"^TransformerBlock: x: expected \(B, T, 64\), got "
                                         r"shape \(37, 64\)$"):
        block(x[0], residual[0])
    with pytest.raises(RuntimeError, match=r"^rmsnorm_residual: residual: expected .*got"):
        block(x, residual[:1])
    with pytest.raises(RuntimeError, match="^rmsnorm_residual: residual: expected the dtype of x"):
        block(x, residual.bfloat16())
