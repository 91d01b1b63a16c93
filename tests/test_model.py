"""The model against transformers' LlamaForCausalLM, and what trainer and generator ask of it."""

import copy
import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from compare import check
from llama_ext.layers import CacheRows
from llama_ext.model import KVCache, Llama, LlamaConfig

B, T = 3, 21
SMALL = LlamaConfig(dim=64, n_layers=3, n_heads=4, vocab_size=101, hidden_dim=96, max_seq_len=32,
                    norm_eps=1e-5, rope_theta=500.0)
GQA = dataclasses.replace(SMALL, n_kv_heads=2)


def make(config=SMALL):
    """A model whose every weight matters: matrices that keep variance, norms about 1."""
    generator = torch.Generator().manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            norm, fan_in = p.dim() == 1, p.shape[-1]
            p.normal_(float(norm), 0.3 if norm else fan_in ** -0.5, generator=generator)
    return model


def data():
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(SMALL.vocab_size, (B, T), generator=generator)
                       for _ in range(2))
    targets[0, :5] = -100
    return tokens, targets


# --- against transformers ---

HF_NAMES = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
            "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
            "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
            "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm", "tok_embeddings": "model.embed_tokens",
            "output": "lm_head"}


def hf_name(name):
    for ours, theirs in HF_NAMES.items():
        name = name.replace(ours + ".weight", theirs + ".weight")
    return name if name.startswith("lm_head") or name.startswith("model.") else "model." + name


def half_split(name, weight, head_dim):
    """Rows of wq, wk from the interleaved order (pairs 2i, 2i+1) to Hugging Face's (i, i + D/2)."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_hf(model):
    c = model.config
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=c.dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, vocab_size=c.vocab_size, intermediate_size=c.hidden_dim,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa"))
    hf.load_state_dict({hf_name(name): half_split(name, p, c.dim // c.n_heads)
                        for name, p in model.state_dict().items()})
    return hf


class ExactRotary(nn.Module):
    """transformers computes its angles in fp32 even in an fp64 model: here in fp64."""

    def __init__(self, config):
        super().__init__()
        head_dim = config.dim // config.n_heads
        exponent = torch.arange(0, head_dim, 2).double() / head_dim
        self.frequency = config.rope_theta ** -exponent

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.frequency
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()


def exact(hf, config):
    """An fp64 copy, with the two parts replaced that transformers would compute in fp32."""
    hf = copy.deepcopy(hf).double()
    hf.model.rotary_emb = ExactRotary(config)
    norms = [name for name, m in hf.named_modules() if type(m).__name__ == "LlamaRMSNorm"]
    for name in norms:
        norm = nn.RMSNorm(config.dim, config.norm_eps)
        norm.weight = hf.get_submodule(name).weight
        hf.set_submodule(name, norm)
    return hf


def hf_run(hf, tokens, targets):
    logits = hf(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return logits, loss, {name: p.grad for name, p in hf.named_parameters()}


@pytest.mark.parametrize("config", [SMALL, GQA], ids=["MHA", "GQA"])
def test_logits_loss_and_gradients_equal_transformers(config):
    model, (tokens, targets) = make(config), data()
    hf = to_hf(model)
    ref_logits, ref_loss, ref_grads = hf_run(exact(hf, config), tokens, targets)
    base_logits, base_loss, base_grads = hf_run(hf, tokens, targets)
    check(model(tokens), ref_logits, base_logits, what="logits")
    loss = model(tokens, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    check(loss, ref_loss, base_loss, what="loss")
    loss.backward()
    assert len(ref_grads) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        grad = half_split(name, p.grad, config.dim // config.n_heads)
        check(grad, ref_grads[hf_name(name)], base_grads[hf_name(name)],
              what=f"gradient of {name}", fp32_roundings=20)  # of three layers, both ways


def test_bf16_autocast_equals_transformers():
    model, (tokens, targets) = make(GQA), data()
    hf = to_hf(model)
    ref_logits, ref_loss, _ = hf_run(exact(hf, GQA), tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        base_logits, base_loss, _ = hf_run(hf, tokens, targets)
        logits, loss = model(tokens), model(tokens, targets)
    check(logits, ref_logits, base_logits, dtype=torch.bfloat16, what="logits")
    check(loss, ref_loss, base_loss, dtype=torch.bfloat16, what="loss")
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all()
               for p in model.parameters())


# --- shapes, names, initial values ---

@pytest.mark.parametrize("name, hidden_dim, parameters", [
    ("tiny", 896, 10_244_160), ("7B", 11008, 6_738_415_616), ("13B", 13824, 13_015_864_320),
    ("33B", 17920, 32_528_943_616), ("65B", 22016, 65_285_660_672)])
def test_presets_have_the_papers_sizes(name, hidden_dim, parameters):
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset(name))
    assert model.config.hidden_dim == hidden_dim
    assert model.num_parameters() == parameters


def test_parameters_have_metas_names():
    names = {f"layers.{i}.{part}.weight" for i in range(3) for part in (
        "attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1",
        "feed_forward.w2", "feed_forward.w3", "attention_norm", "ffn_norm")}
    names |= {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert set(make().state_dict()) == names


def test_initial_values():
    config = LlamaConfig(dim=128, n_layers=8, n_heads=2, vocab_size=512)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").reset_parameters(torch.Generator().manual_seed(3))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            std = 0.02 / 4 if name.endswith(("wo.weight", "w2.weight")) else 0.02
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < std / 30
    twin = Llama(config)
    twin.reset_parameters(torch.Generator().manual_seed(3))
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens), twin(tokens))


def test_tied_embeddings():
    model = make(dataclasses.replace(SMALL, tie_embeddings=True))
    assert "output.weight" not in model.state_dict()
    assert model.num_parameters() == make().num_parameters() - 101 * 64
    twin = make()
    twin.load_state_dict({**model.state_dict(), "output.weight": model.tok_embeddings.weight})
    tokens, targets = data()
    assert torch.equal(model(tokens), twin(tokens))
    assert torch.equal(model(tokens, targets), twin(tokens, targets))


def test_config_round_trip_and_preset_overrides():
    config = LlamaConfig.preset("7B", max_seq_len=4096, n_kv_heads=8)
    assert (config.dim, config.max_seq_len, config.n_kv_heads) == (4096, 4096, 8)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert config.head_dim == 128 and "head_dim" not in config.to_dict()
    config = LlamaConfig(dim=90, n_heads=4, n_kv_heads=2, head_dim=32)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert (config.q_dim, config.kv_dim, config.to_dict()["head_dim"]) == (128, 64, 32)


@pytest.mark.parametrize("fields, message", [
    ({"dim": 100}, r"dim: expected a multiple of 2 \* n_heads = 16, got 100"),
    ({"n_layers": 0}, "n_layers: expected a positive int, got 0"),
    ({"vocab_size": 1e3}, "vocab_size: expected a positive int, got 1000.0"),
    ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads = 8, got 3"),
    ({"hidden_dim": -4}, "hidden_dim: expected a positive int or None, got -4"),
    ({"head_dim": 7}, "head_dim: expected a positive even int or None, got 7"),
    ({"head_dim": 0}, "head_dim: expected a positive even int or None, got 0"),
    ({"norm_eps": -1.0}, "norm_eps: expected a number >= 0, got -1.0"),
    ({"rope_theta": 0.0}, "rope_theta: expected a number > 0, got 0.0"),
    ({"heads": 8}, "field: expected one of dim, .*, got 'heads'")])
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=f"LlamaConfig: {message}"):
        LlamaConfig.from_dict(fields)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset: expected one of tiny, 7B, .*, got '8B'"):
        LlamaConfig.preset("8B")


# --- cache ---

@pytest.mark.parametrize("config", [SMALL, GQA], ids=["MHA", "GQA"])
def test_cached_steps_equal_one_pass(config):
    model, (tokens, _) = make(config), data()
    with torch.inference_mode():
        base = model(tokens)
        exact_logits = exact(to_hf(model), config)(tokens).logits
        cache = KVCache(config, B, T + 2)
        cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
        for _ in range(2):  # the second time over a used cache
            cache.length = 0
            cuts = [0, 9, 13, *range(14, T + 1)]
            steps = [model(tokens[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
            assert cache.length == T
            check(torch.cat(steps, 1), exact_logits, base)
        cache.length = 9
        last = model(tokens[:, 9:13], cache=cache, last_only=True)
        assert last.shape == (B, 1, config.vocab_size)
        check(last, exact_logits[:, 12:13], base[:, 12:13])


@pytest.mark.parametrize("config", [SMALL, GQA], ids=["MHA", "GQA"])
def test_rows_of_a_cache_grow_each_by_its_own_number_of_tokens(config):
    """Every row has the logits of one pass over its tokens, whatever stands in the others."""
    model, (tokens, _) = make(config), data()
    cache = KVCache(config, 4, T + 2)
    cache.k.fill_(torch.nan), cache.v.fill_(torch.nan)
    at, logits = [0, 0, 0], [[], [], []]
    with torch.inference_mode():
        base = model(tokens)
        exact_logits = exact(to_hf(model), config)(tokens).logits
        for counts in ({0: 9}, {0: 1, 1: 5, 2: 1}, {1: 1, 2: 3}, {0: 2, 2: 1}, {2: 2},
                       {0: 1, 1: 7}):
            rows = CacheRows([b + 1 for b in counts], [at[b] for b in counts],
                             list(counts.values()), (4, T + 2))
            packed = torch.cat([tokens[b, at[b]:at[b] + n] for b, n in counts.items()])[None]
            last = model(packed, cache=cache, rows=rows, last_only=True)
            got = model(packed, cache=cache, rows=rows)
            assert cache.length == 0
            for b, part in zip(counts, got[0].split(list(counts.values()))):
                logits[b].append(part)
                at[b] += len(part)
            newest = [*counts], [at[b] - 1 for b in counts]
            check(last[0], exact_logits[newest], base[newest])
    for b in range(3):
        check(torch.cat(logits[b]), exact_logits[b, :at[b]], base[b, :at[b]])


@pytest.mark.parametrize("rows, starts, counts, message", [
    ([1, 0], [0, 0], [1, 1], r"rows: expected rising numbers from 0 to 1, got \[1, 0\]"),
    ([0, 2], [0, 0], [1, 1], r"from 0 to 1, got \[0, 2\]"),
    ([0, 1], [0, 3], [1, 2], r"the cache's 4 positions, got starts \[0, 3\], counts \[1, 2\]"),
    ([0], [-1], [1], "starts >= 0"), ([0], [1], [0], "counts >= 1")])
def test_rows_that_do_not_fit(rows, starts, counts, message):
    with pytest.raises(ValueError, match=message):
        CacheRows(rows, starts, counts, (2, 4))


def test_cache_and_context_limits():
    model, (tokens, _) = make(), data()
    with pytest.raises(ValueError, match="max_len: expected 1 to max_seq_len = 32, got 33"):
        KVCache(SMALL, B, 33)
    with pytest.raises(ValueError, match="expected at most max_seq_len = 32 positions, got 42"):
        model(torch.cat((tokens, tokens), 1))
    cache = KVCache(SMALL, B, 25)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="at most max_seq_len = 32 positions, got 42"):
            model(tokens, cache=cache)
        with pytest.raises(ValueError, match="expected batch 3 and room for 26 positions, got "
                                             "batch 3 and 25 positions"):
            model(tokens[:, :5], cache=cache)
        with pytest.raises(ValueError, match="expected batch 1 and room for 22"):
            model(tokens[:1, :1], cache=cache)
    assert cache.length == T


@pytest.mark.parametrize("bad", [-1, 101])
def test_token_ids_outside_the_vocabulary(bad):
    tokens, _ = data()
    tokens[1, 3] = bad
    with pytest.raises(ValueError, match=rf"tokens: expected ids from 0 to 100, got .*{bad}"):
        make()(tokens)


def test_tokens_of_wrong_shape():
    with pytest.raises(ValueError, match=r"tokens: expected \(B, T\), got shape \(4,\)"):
        make()(torch.arange(4))


# --- inside other machinery ---

def loss_and_gradients(model, tokens, targets):
    loss = model(tokens, targets)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


def test_activation_checkpointing_changes_nothing():
    tokens, targets = data()
    expected = loss_and_gradients(make(), tokens, targets)
    model, runs = make(), []
    for layer in model.layers:
        def counted(*args, forward=layer.forward):
            runs.append(1)
            return forward(*args)
        layer.forward = functools.partial(checkpoint, counted, use_reentrant=False)
    got = loss_and_gradients(model, tokens, targets)
    assert len(runs) == 2 * SMALL.n_layers  # each layer ran again in the backward pass
    assert all(torch.equal(g, e) for g, e in zip(got, expected))


def test_compiles_whole_with_dynamic_length():
    tokens, targets = data()
    config = dataclasses.replace(GQA, n_layers=2)
    model = make(config)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True,
                             backend="aot_eager")
    compiled(tokens, targets)
    with torch.compiler.set_stance("fail_on_recompile"):
        short = tokens[:, :12].contiguous(), targets[:, :12].contiguous()
        got = loss_and_gradients(compiled, *short)
    hf = to_hf(model)
    _, loss, grads = hf_run(exact(hf, config), *short)
    expected = [loss] + [grads[hf_name(name)] for name, _ in model.named_parameters()]
    base = loss_and_gradients(model, *short)
    names = ["loss"] + [name for name, _ in model.named_parameters()]
    for name, g, e, b in zip(names, got, expected, base):
        check(half_split(name, g, 16), e, half_split(name, b, 16), what=name)
