"""Tiny models in every format, for the tests that convert them."""

import dataclasses
import json

import torch
import transformers

from llama_ext import Llama, LlamaConfig

SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 101, "hidden_dim": 96,
         "max_seq_len": 64, "norm_eps": 1e-5}
CONFIGS = {
    "llama 1": LlamaConfig(**SHAPE),
    "llama 2 GQA": LlamaConfig(**SHAPE, n_kv_heads=2),
    "llama 3 tied": LlamaConfig(**SHAPE, n_kv_heads=2, rope_theta=500000.0, tie_embeddings=True,
                                rope_scaling=SCALING),
    "own head_dim": LlamaConfig(**SHAPE, n_kv_heads=2, head_dim=24),
}


def ours(config, dtype=torch.float32):
    """A model whose every weight matters."""
    torch.manual_seed(0)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model.to(dtype)


def theirs(config, dtype=torch.float32):
    """transformers' own model of that shape, with random weights of its own."""
    torch.manual_seed(1)
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {"rope_type": "default"})}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, vocab_size=config.vocab_size, intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        rope_parameters=rope, tie_word_embeddings=config.tie_embeddings))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def save_meta(model, folder, ranks=1, split_vocabulary=False):
    """Meta's files of our model: each rank's parts as their model-parallel code cuts them."""
    folder.mkdir()
    c = model.config
    for rank in range(ranks):
        state = {"rope.freqs": torch.ones(c.head_dim // 2)}
        for name, p in model.state_dict().items():
            axis = None
            if name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight")):
                axis = 0
            elif name == "output.weight":
                axis = 0
            elif name.endswith(("wo.weight", "w2.weight")):
                axis = 1
            elif name == "tok_embeddings.weight":
                axis = 0 if split_vocabulary else 1
            state[name] = (p if axis is None else p.chunk(ranks, axis)[rank]).clone()
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    params = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "vocab_size": -1,
              "n_kv_heads": c.n_kv_heads, "norm_eps": c.norm_eps, "multiple_of": 32,
              "rope_theta": c.rope_theta, "max_seq_len": c.max_seq_len}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def even_vocabulary(model):
    """Its like with a vocabulary that two ranks can share."""
    return ours(dataclasses.replace(model.config, vocab_size=102))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
