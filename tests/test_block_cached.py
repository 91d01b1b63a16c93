"""Transformer blocks over cached rows as one operator: the bits of the composition, and when."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, randn
from llama_ext.block import cached_blocks
from llama_ext.generate import generate
from llama_ext.layers import CacheRows
from llama_ext.model import KVCache, TransformerBlock
from llama_ext.ops.linear import FEW_ROWS

SIZE = 3, 7  # rows of the cache, positions


def make(dtype=torch.float32, window=None, interleaved=True, **shape):
    config = lx.LlamaConfig(**{"dim": 48, "n_layers": 1, "n_heads": 6, "n_kv_heads": 2,
                               "vocab_size": 9, "hidden_dim": 80, "max_seq_len": 16} | shape)
    rotary = lx.layers.RotaryEmbedding(config.head_dim, interleaved=interleaved)
    block = TransformerBlock(config, rotary, dtype=dtype)
    for p in block.parameters():
        p.data = randn(*p.shape, dtype=dtype, scale=0.2)
    block.attention.window, block.attention_norm.eps, block.ffn_norm.eps = window, 1e-2, 3e-2
    cache = KVCache(config, *SIZE, dtype)
    cache.k.copy_(randn(*cache.k.shape)), cache.v.copy_(randn(*cache.v.shape))
    return block, (cache.k[0], cache.v[0])


def rows_and_inputs(dtype=torch.float32, first=False, counts=(1, 4), width=48):
    rows = CacheRows([0, 2], [5, 2], list(counts), SIZE)
    x, residual = (randn(1, sum(counts), width, dtype=dtype) for _ in range(2))
    return rows, (x, None if first else residual)


def both(block, cache, inputs, rows):
    """(outputs and cache of the operator, of the composition)."""
    found = []
    for run in (lambda kv: cached_blocks([block], *inputs, rows, *(t[None] for t in kv)),
                lambda kv: composed(block)(*inputs, rows, kv)):
        kv = tuple(t.clone() for t in cache)
        with torch.no_grad():
            found.append((*run(kv), *kv))
    return found


def composed(block):
    """The block's forward, with a hook that keeps it from being one operator."""
    def forward(*args):
        hook = block.ffn_norm.register_forward_hook(lambda *_: None)
        try:
            return block(*args)
        finally:
            hook.remove()
    return forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_every_instruction_set(isa, first, dtype):
    block, cache = make(dtype)
    rows, inputs = rows_and_inputs(dtype, first)
    for got, expected in zip(*both(block, cache, inputs, rows)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("options", [
    {"window": 2}, {"interleaved": False}, {"n_kv_heads": 6}, {"n_kv_heads": 1, "head_dim": 10},
    {"hidden_dim": 33}])
def test_shapes_and_options(options):
    block, cache = make(**options)
    rows, inputs = rows_and_inputs()
    for got, expected in zip(*both(block, cache, inputs, rows)):
        assert torch.equal(got, expected)


def test_norms_in_fp32():
    block, cache = make(torch.bfloat16)
    block.attention_norm.float(), block.ffn_norm.float()
    rows, inputs = rows_and_inputs(torch.bfloat16)
    for got, expected in zip(*both(block, cache, inputs, rows)):
        assert torch.equal(got, expected)


def test_when_it_is_used(monkeypatch):
    calls = []

    def spy(*args):
        calls.append(1)
        return cached_blocks(*args)
    monkeypatch.setattr("llama_ext.model.cached_blocks", spy)
    block, cache = make()
    rows, inputs = rows_and_inputs()
    with torch.no_grad():
        expected = block(*inputs, rows, cache)
        assert calls.pop()
        assert all(map(torch.equal, composed(block)(*inputs, rows, cache), expected))
        with torch.autocast("cpu", torch.bfloat16):
            block(*inputs, rows, tuple(t.bfloat16() for t in cache))
        many, longer = rows_and_inputs(counts=(2, 5))
        assert block(*longer, many, cache)[0].shape[1] < FEW_ROWS and calls.pop()
        block(randn(1, 4, 48), None, 0, tuple(t[:1] for t in cache))
    wide = CacheRows([0, 1, 2], [0, 0, 0], [3, 3, 3], SIZE)
    with torch.no_grad():
        block(randn(1, 9, 48), None, wide, cache)
    block(*inputs, rows, cache)
    assert not calls


def tiny_model(n_layers=3):
    return lx.Llama(lx.LlamaConfig(dim=48, n_layers=n_layers, n_heads=6, n_kv_heads=2,
                                   vocab_size=50, hidden_dim=80, max_seq_len=32))


def test_a_model_generates_through_it(monkeypatch):
    model, prompts = tiny_model(), [[3, 4, 5], [7], [9, 9, 2, 1]]
    for i, layer in enumerate(model.layers):
        layer.attention_norm.eps, layer.ffn_norm.eps = 0.1 * i, 0.1 * i + 0.05
    with_it = generate(model, prompts, 10, seed=1)
    monkeypatch.setattr("llama_ext.model.all_run_as_one_operator", lambda *_: False)
    assert generate(model, prompts, 10, seed=1) == with_it
    monkeypatch.setattr("llama_ext.model.runs_as_one_operator", lambda *_: False)
    assert generate(model, prompts, 10, seed=1) == with_it


class OtherBlock(TransformerBlock):
    pass


def own_forward(layer):
    layer.forward = lambda *args: TransformerBlock.forward(layer, *args)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)


def with_its_own_rotary(layer):
    rotary = layer.attention.rotary
    layer.attention.rotary = lx.layers.RotaryEmbedding(rotary.head_dim, rotary.theta)


# What is done to the last of three layers, and how many blocks then make each operator.
@pytest.mark.parametrize("change, expected", [
    (lambda layer: None, [3]),
    (hooked, [1, 1, 1]),
    (own_forward, [1, 1, 1]),
    (lambda layer: setattr(layer, "__class__", OtherBlock), [1, 1, 1]),
    (lambda layer: layer.compile(backend="eager"), [1, 1]),
    (lambda layer: hooked(layer.attention), [1, 1]),
    (lambda layer: setattr(layer.attention, "window", 2), [1, 1, 1]),
    (with_its_own_rotary, [1, 1, 1])])
def test_all_layers_are_one_operator_if_alike_and_nothing_sees_one(monkeypatch, change, expected):
    model, calls = tiny_model(), []

    def spy(blocks, *args):
        if not torch.compiler.is_compiling():
            calls.append(len(blocks))
        return cached_blocks(blocks, *args)
    monkeypatch.setattr("llama_ext.model.cached_blocks", spy)
    change(model.layers[-1])
    caches = [KVCache(model.config, 1) for _ in range(2)]
    with torch.no_grad():
        for start, tokens in ((0, torch.tensor([[3, 4, 5]])), (3, torch.tensor([[6]]))):
            rows = CacheRows([0], [start], [tokens.shape[1]], (1, 32))
            calls.clear()
            got = model(tokens, cache=caches[0], rows=rows)
            assert calls == expected
            with monkeypatch.context() as patch:
                for name in ("all_run_as_one_operator", "runs_as_one_operator"):
                    patch.setattr(f"llama_ext.model.{name}", lambda *_: False)
                assert torch.equal(got, model(tokens, cache=caches[1], rows=rows))


def test_global_hooks_see_every_layer():
    model, seen = tiny_model(), []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module)))
    try:
        with torch.no_grad():
            model(torch.tensor([[3]]), cache=KVCache(model.config, 1),
                  rows=CacheRows([0], [0], [1], (1, 32)))
    finally:
        hook.remove()
    assert seen.count(TransformerBlock) == 3


@pytest.mark.parametrize("change, sentence", [
    ({"x": randn(2, 1, 48)}, r"x: expected a CPU tensor of shape \(1, N, C\), got \(2, 1, 48\)"),
    ({"slots": torch.tensor([1, 21])}, "slots: expected 0 to 20, got 21"),
    ({"slots": torch.tensor([1])}, r"slots: expected int64 of shape \(2,\), got \(1,\)"),
    ({"k_cache": randn(1, 21, 2, 8).half()},
     "k_cache: expected the dtype of x, float32, got float16"),
    ({"k_cache": randn(1, 2, 21, 8).transpose(1, 2)},
     r"k_cache: expected a contiguous CPU tensor of shape \(1, S, 2, 8\), got \(1, 21, 2, 8\)"),
    ({"k_cache": randn(2, 21, 2, 8)},
     r"k_cache: expected a contiguous CPU tensor of shape \(1, S, 2, 8\), got \(2, 21, 2, 8\)"),
    ({"v_cache": randn(1, 21, 1, 8)},
     r"v_cache: expected a contiguous CPU tensor of shape \(1, S, 2, 8\), got \(1, 21, 1, 8\)"),
    ({"v_cache": randn(1, 20, 2, 8)},
     r"v_cache: expected the shape of k_cache, \(1, 21, 2, 8\), got \(1, 20, 2, 8\)"),
    ({"head_dim": 0}, r"weights: expected heads of 0, got weights of queries \(48, 48\) and of "
                      r"keys \(16, 48\)"),
    ({"head_dim": 7}, r"weights: expected heads of 7, .*"),
    ({"weights": [randn(48)] * 8}, "weights: expected 9 for each block, got 8"),
    ({"weights": []}, "weights: expected 9 for each block, got 0"),
    ({"eps": [1e-6]}, "eps: expected 2 for each block, got 1 for 1"),
    ({"eps": [1e-6, -1.0]}, "eps: expected numbers >= 0, got -1"),
    ({"residual": randn(1, 1, 48)},
     r"residual: expected the shape of x, \(1, 2, 48\), got \(1, 1, 48\)"),
    ({"window": -1}, "window: expected at least 1, got -1"),
    ({"cu_k": torch.tensor([0, 21], dtype=torch.int32)},
     "cu_k: expected as many offsets as of cu_q, 6, got 2"),
    ({"cu_q": torch.tensor([0, 1], dtype=torch.int32)},
     "cu_q: expected offsets from 0 to 2, the tokens, got 0 to 1"),
    ({"cos": randn(1, 4)},
     r"cos: expected shape \(2, 4\) or \(1, 2, 4\), got \(1, 4\)"),
    ({0: randn(47)}, r"weights: expected a norm's of shape \(48,\), got \(47,\)"),
    ({5: randn(48).half()}, "weights: expected float32, got float16"),
    ({1: randn(48, 47)}, r"weights: expected wq of shape \(48, 48\), got \(48, 47\)"),
    ({2: randn(16, 47), 3: randn(16, 47)},
     r"weights: expected wk of shape \(16, 48\), got \(16, 47\)"),
    ({3: randn(8, 48)}, r"weights of values: expected the shape of weights of keys, \(16, 48\), "
                        r"got \(8, 48\)"),
    ({4: randn(48, 40)}, r"weights: expected wo of shape \(48, 48\), got \(48, 40\)"),
    ({6: randn(48)}, r"weights: expected w1 of shape \(F, 48\), got \(48,\)"),
    ({7: randn(79, 48)}, r"weights: expected w3 of shape \(80, 48\), got \(79, 48\)"),
    ({8: randn(48, 79)}, r"weights: expected w2 of shape \(48, 80\), got \(48, 79\)"),
    ({8: randn(48, 80).double()}, "weights: expected the dtype of x, float32, got float64")])
def test_bad_input_is_one_sentence(change, sentence):
    """change: of the arguments, or of the weights by number."""
    block, cache = make()
    rows, (x, residual) = rows_and_inputs(counts=(1, 1))
    args = {"x": x, "residual": residual, "weights": [p.detach() for p in block_weights(block)],
            "eps": [1e-6, 1e-6], "head_dim": 8, "window": 0, "interleaved": True, "cos": None,
            "sin": None, "k_cache": cache[0].flatten(0, 1)[None],
            "v_cache": cache[1].flatten(0, 1)[None], "slots": rows.slots,
            "cu_q": rows.cu_seqlens[0], "cu_k": rows.cu_seqlens[1]}
    args["cos"], args["sin"] = rows.tables(block.attention.rotary, torch.float32)
    for name, value in change.items():
        if isinstance(name, int):
            args["weights"][name] = value
        else:
            args[name] = value
    before = [t.clone() for t in cache]
    with pytest.raises(RuntimeError, match=f"^blocks_cached: {sentence}$"):
        torch.ops.llama_ext.blocks_cached(**args)
    assert all(map(torch.equal, cache, before))


def test_blocks_of_other_widths():
    """Of keys they are refused, before anything is written; others may be as they like."""
    (one, cache), (keys, _), (hidden, _) = make(), make(n_kv_heads=3), make(hidden_dim=33)
    rows, (x, residual) = rows_and_inputs(counts=(1, 1))
    k, v = (torch.stack([t, t]) for t in cache)
    before = k.clone()
    with torch.no_grad(), pytest.raises(
            RuntimeError, match=r"^blocks_cached: weights of keys: expected the shape of those of "
                                r"the first block, \(16, 48\), got \(24, 48\)$"):
        cached_blocks([one, keys], x, residual, rows, k, v)
    assert torch.equal(k, before)
    with torch.no_grad():
        for pair in ([one, hidden], [hidden, one]):
            got = cached_blocks(pair, x, residual, rows, k.clone(), v.clone())
            expected = x, residual
            for block in pair:
                expected = composed(block)(*expected, rows, cache)
            assert all(map(torch.equal, got, expected))


def every_second(t):
    return torch.stack([t, t + 1], -1)[..., 0]


def with_gaps(t):
    return torch.cat([t, t + 1], -1)[..., :t.shape[-1]]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("layout", [every_second, with_gaps])
def test_strided_inputs_and_weights(layout, first):
    block, cache = make()
    rows, (x, residual) = rows_and_inputs(first=first)
    with torch.no_grad():
        expected = cached_blocks([block], x, residual, rows, *(t[None].clone() for t in cache))
        for parameter in block.parameters():
            parameter.data = layout(parameter.data)
        strided = layout(x), None if first else layout(residual)
        got = cached_blocks([block], *strided, rows, *(t[None].clone() for t in cache))
    assert all(map(torch.equal, got, expected))


def block_weights(block):
    a, f = block.attention, block.feed_forward
    return [block.attention_norm.weight, a.wq.weight, a.wk.weight, a.wv.weight, a.wo.weight,
            block.ffn_norm.weight, f.w1.weight, f.w3.weight, f.w2.weight]
