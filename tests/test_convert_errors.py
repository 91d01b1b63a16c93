"""What convert and lx.hf say of bad input: one sentence, before anything is written."""

import dataclasses
import json
import os
import re

import pytest
import safetensors.torch
import torch

import llama_ext as lx
from hf_models import CONFIGS, even_vocabulary, ours, save_meta
from llama_ext import LlamaExtError
from llama_ext.convert import convert

def edited(change):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return damage


def tensors(change):
    def damage(folder):
        file = folder / "model.safetensors"
        state = safetensors.torch.load_file(file)
        change(state)
        safetensors.torch.save_file(state, file)
    return damage


def truncate(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


DAMAGE = {
    "missing": (tensors(lambda s: s.pop("model.norm.weight")),
                "expected 21 tensors, missing are model.norm.weight"),
    "unexpected": (tensors(lambda s: s.update({"model.layers.7.x": torch.ones(1)})),
                   "also got model.layers.7.x"),
    "bias": (tensors(lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
             "also got model.layers.0.self_attn.q_proj.bias"),
    "shape": (tensors(lambda s: s.update({"model.norm.weight": torch.ones(63)})),
              "model.norm.weight: expected shape (64,), got (63,)"),
    "dtype": (tensors(lambda s: s.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
              "model.norm.weight: expected float32, bfloat16, float16 or float64, got other"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "no file": (lambda f: os.remove(f / "model.safetensors"), "found neither"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "config.json: expected"),
    "architecture": (edited(lambda c: c.update(architectures=["GPT2LMHeadModel"])),
                     'architectures: expected ["LlamaForCausalLM"], got ["GPT2LMHeadModel"]'),
    "attention_bias": (edited(lambda c: c.update(attention_bias=True)),
                       "attention_bias: expected false, got true"),
    "rope": (edited(lambda c: c.update(rope_scaling={"type": "dynamic", "factor": 2.0})),
             "rope_type: expected one of default, linear, llama3, got 'dynamic'"),
    "head_dim": (edited(lambda c: c.update(head_dim=15)),
                 "head_dim: expected a positive even int or None, got 15"),
    "other head_dim": (edited(lambda c: c.update(head_dim=32)),
                       "q_proj.weight: expected shape (128, 64), got (64, 64)"),
    "field": (edited(lambda c: c.pop("hidden_size")), "expected the field hidden_size"),
    "value": (edited(lambda c: c.update(hidden_size="64")), "dim: expected"),
}


@pytest.mark.parametrize("damage, sentence", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_hf(damage, sentence, tmp_path):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(LlamaExtError, match=re.escape(sentence)) as error:
        convert(tmp_path / "hf", tmp_path / "out", "meta")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def truncate_rank(folder):
    os.truncate(folder / "consolidated.01.pth", 1000)


META_DAMAGE = {
    "truncated": (truncate_rank, "consolidated.01.pth cannot be read"),
    "code": (lambda f: torch.save(Evil(), f / "consolidated.00.pth"), "other Python objects"),
    "not tensors": (lambda f: torch.save([1], f / "consolidated.00.pth"), "a dict of tensors"),
    "gap": (lambda f: os.rename(f / "consolidated.01.pth", f / "consolidated.02.pth"),
            "got the numbers 0, 2"),
    "no part": (lambda f: [p.unlink() for p in f.glob("*.pth")], "found none"),
    "names": (lambda f: torch.save({"norm.weight": torch.ones(64)}, f / "consolidated.01.pth"),
              "consolidated.01.pth: expected the same tensors"),
    "params": (lambda f: (f / "params.json").write_text("{}"), "dim: expected an int, got None"),
}


@pytest.mark.parametrize("damage, sentence", META_DAMAGE.values(), ids=META_DAMAGE.keys())
def test_damaged_meta(damage, sentence, tmp_path):
    save_meta(even_vocabulary(ours(CONFIGS["llama 1"])), tmp_path / "meta", 2)
    damage(tmp_path / "meta")
    with pytest.raises(LlamaExtError, match=re.escape(sentence)) as error:
        lx.hf.load(tmp_path / "meta")
    assert "\n" not in str(error.value)


def test_damaged_shards(tmp_path):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf", shard_size="60KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    shards = sorted(tmp_path.glob("hf/*.safetensors"))
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = shards[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(LlamaExtError, match="expected the tensor model.norm.weight that"):
        lx.hf.load(tmp_path / "hf")
    shards[1].unlink()
    with pytest.raises(LlamaExtError, match=f"{shards[1].name} cannot be read"):
        lx.hf.load(tmp_path / "hf")


def test_damaged_ours(tmp_path):
    model = ours(CONFIGS["llama 1"])
    lx.hf.save(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "ours")
    with open(tmp_path / "ours" / "model.safetensors", "r+b") as f:
        f.seek(5000)
        f.write(b"?")
    with pytest.raises(LlamaExtError, match="model.safetensors is damaged"):
        lx.hf.load(tmp_path / "ours")


def test_options_and_places(tmp_path):
    model = ours(CONFIGS["llama 1"])
    lx.hf.save(model, tmp_path / "hf")
    for options, sentence in (({"to": "gguf"}, "to: expected one of hf, meta, ours, got 'gguf'"),
                              ({"to": "hf", "dtype": "int8"}, "dtype: expected one of"),
                              ({"to": "hf", "shard_size": "big"}, "shard_size: expected a size")):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            convert(tmp_path / "hf", tmp_path / "out", **options)
    before = (tmp_path / "hf" / "config.json").read_bytes()
    for out, sentence in ((tmp_path / "hf", "expected a new folder's name, but it exists"),
                          (tmp_path / "no" / "out", "expected a folder to write into, got none")):
        with pytest.raises(LlamaExtError, match=sentence):
            convert(tmp_path / "hf", out, "meta")
        with pytest.raises(LlamaExtError, match=sentence):
            lx.hf.save(model, out)
    assert (tmp_path / "hf" / "config.json").read_bytes() == before
    with pytest.raises(LlamaExtError, match="expected a folder with a model, got none"):
        convert(tmp_path / "none", tmp_path / "out", "meta")
    with pytest.raises(LlamaExtError, match="expected a folder with model.safetensors or with"):
        convert(tmp_path, tmp_path / "out", "meta")
    with pytest.raises(ValueError, match="expected a Llama, got Linear"):
        lx.hf.save(torch.nn.Linear(1, 1), tmp_path / "out")
    linear = ours(dataclasses.replace(model.config, rope_scaling={"rope_type": "linear",
                                                                  "factor": 2.0}))
    lx.hf.save(linear, tmp_path / "linear")
    assert lx.hf.load(tmp_path / "linear").config.rope_scaling["factor"] == 2.0
    with pytest.raises(LlamaExtError, match="all that Meta's format can say"):
        convert(tmp_path / "linear", tmp_path / "out", "meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "linear"]


def test_a_head_dim_that_metas_format_cannot_say(tmp_path):
    lx.hf.save(ours(CONFIGS["own head_dim"]), tmp_path / "hf")
    with pytest.raises(LlamaExtError, match="head_dim: expected dim / n_heads = 16, all that "
                                            "Meta's format can say, got 24"):
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
