"""Weights between Hugging Face's, Meta's and our format: the same bits, in bounded memory."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
import safetensors.torch
import torch
import transformers

import llama_ext as lx
from compare import check
from hf_models import CONFIGS, ours, same_weights, save_meta, theirs
from llama_ext import LlamaExtError, checkpoint, cli, convert as convert_module, formats
from llama_ext.convert import convert
from llama_ext.tokenizer import Tokenizer

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(["one two three four five"] * 20, path, 290)
    return path


# --- parity ---

@every_config
def test_transformers_model_loads_with_its_logits(config, tmp_path):
    hf = theirs(config)
    hf.save_pretrained(tmp_path / "hf")
    model = lx.hf.load(tmp_path / "hf")
    assert dataclasses.replace(model.config, multiple_of=256) == config
    tokens = torch.randint(config.vocab_size, (2, 33))
    with torch.no_grad():
        reference = lx.hf.load(tmp_path / "hf", dtype="float64")(tokens)
        check(model(tokens), reference, hf(tokens).logits, what="logits")


@every_config
def test_transformers_loads_what_we_save(config, tmp_path):
    model = ours(config)
    lx.hf.save(model, tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(hf) is transformers.LlamaForCausalLM and hf.dtype == torch.float32
    rope = hf.config.rope_parameters
    assert rope["rope_theta"] == config.rope_theta
    assert rope["rope_type"] == (config.rope_scaling or {"rope_type": "default"})["rope_type"]
    tokens = torch.randint(config.vocab_size, (2, 33))
    with torch.no_grad():
        reference = lx.hf.load(tmp_path / "hf", dtype="float64")(tokens)
        check(model(tokens), reference, hf(tokens).logits, what="logits")


# --- there and back ---

@every_config
def test_every_way_round_keeps_every_bit(config, tmp_path):
    model = ours(config, torch.bfloat16)
    lx.hf.save(model, tmp_path / "0", shard_size=20000)
    folder = tmp_path / "0"
    for step, to in enumerate(("ours", "meta", "hf", "meta", "ours", "hf"), 1):
        convert(folder, tmp_path / str(step), to, shard_size=20000)
        folder = tmp_path / str(step)
        assert same_weights(lx.hf.load(folder), model)
    assert dataclasses.replace(lx.hf.load(folder).config, multiple_of=256) == config
    first, last = (safetensors_of(tmp_path / name) for name in ("0", "6"))
    assert first.keys() == last.keys() and len(first) > 1
    assert all(a == last[name] for name, a in first.items())


def safetensors_of(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.mark.parametrize("split_vocabulary", [False, True])
def test_model_parallel_ranks_are_joined(split_vocabulary, tmp_path):
    model = ours(dataclasses.replace(CONFIGS["llama 2 GQA"], vocab_size=102), torch.float16)
    save_meta(model, tmp_path / "meta", 2, split_vocabulary)
    loaded = lx.hf.load(tmp_path / "meta")
    assert same_weights(loaded, model) and loaded.config.hidden_dim == 96
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    assert same_weights(lx.hf.load(tmp_path / "hf"), model)


def test_metas_file_is_one_that_torch_loads(tmp_path):
    model = ours(CONFIGS["llama 3 tied"])
    lx.hf.save(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    state = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert torch.equal(state.pop("output.weight"), model.tok_embeddings.weight)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert params["use_scaled_rope"] and params["rope_scaling_factor"] == 8.0
    hidden = int(2 * 4 * params["dim"] / 3)  # as Meta's code has it
    hidden = int(params.get("ffn_dim_multiplier", 1) * hidden)
    m = params["multiple_of"]
    assert m * ((hidden + m - 1) // m) == model.config.hidden_dim


@pytest.mark.parametrize("dim, factor", [(4096, 8.0), (2048, 32.0)])
def test_metas_scaling_is_that_of_the_release(dim, factor):
    params = {"dim": dim, "n_layers": 1, "n_heads": 32, "n_kv_heads": 8, "norm_eps": 1e-5,
              "rope_theta": 500000.0, "use_scaled_rope": True}
    tensors = {name: formats.Entry(shape, torch.bfloat16, None) for name, shape in
               (("tok_embeddings.weight", (9, dim)),
                ("layers.0.feed_forward.w1.weight", (100, dim)))}
    config = formats._meta_config("params.json", params, tensors, tied=False)
    assert config.rope_scaling["factor"] == factor and config.max_seq_len == 131072


@pytest.mark.parametrize("shard", [False, True])
def test_pytorch_bin(shard, tmp_path):
    hf = theirs(CONFIGS["llama 2 GQA"])
    hf.save_pretrained(tmp_path / "a")
    state = hf.state_dict()
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # of old versions
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copy(tmp_path / "a" / "config.json", folder)
    if shard:
        files = {name: f"pytorch_model-{1 + i % 2:05d}-of-00002.bin"
                 for i, name in enumerate(state)}
        for file in set(files.values()):
            torch.save({n: t for n, t in state.items() if files[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    assert same_weights(lx.hf.load(folder), lx.hf.load(tmp_path / "a"))


def test_dtype(tmp_path):
    model = ours(CONFIGS["llama 1"])
    lx.hf.save(model, tmp_path / "hf")
    for to in ("hf", "meta", "ours"):
        convert(tmp_path / "hf", tmp_path / f"to-{to}", to, dtype="bfloat16")
        assert same_weights(lx.hf.load(tmp_path / f"to-{to}"),
                            ours(CONFIGS["llama 1"], torch.bfloat16))
    assert json.loads((tmp_path / "to-hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert lx.hf.load(tmp_path / "hf", dtype=torch.float16).output.weight.dtype == torch.float16


def test_shards_are_at_most_shard_size(tmp_path):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf", shard_size="60KB")
    shards = sorted(tmp_path.glob("hf/*.safetensors"))
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(p).values()) for p in shards]
    assert len(shards) > 2 and max(sizes) <= 60000
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.float32


# --- memory, interruption ---

@pytest.mark.parametrize("to", convert_module.FORMATS)
@pytest.mark.parametrize("source", ["hf", "meta"])
def test_one_tensor_at_a_time(to, source, tmp_path):
    model = ours(CONFIGS["llama 2 GQA"])
    if source == "hf":
        lx.hf.save(model, tmp_path / "in")
    else:
        save_meta(even_vocabulary(model), tmp_path / "in", 2)
    live, most, weights = [], 0, formats.open_weights(tmp_path / "in")

    def counted(read):
        def call():
            nonlocal most
            tensor = read().clone()
            live.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in live))
            return tensor
        return call

    weights.tensors = {n: e._replace(read=counted(e.read)) for n, e in weights.tensors.items()}
    convert_module.write(weights, tmp_path / "out", to, dtype="float64")
    assert len(live) == len(weights.tensors) and most <= 2


def even_vocabulary(model):
    """Its like with a vocabulary that two ranks can share."""
    return ours(dataclasses.replace(model.config, vocab_size=102))


def test_killed_conversion_leaves_nothing_that_looks_complete(tmp_path):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf")
    script = ("import sys, time\nfrom llama_ext import convert, formats\n"
              "weights = formats.open_weights(sys.argv[1])\n"
              "last = list(weights.tensors)[-1]\n"
              "def hang():\n    print('there', flush=True)\n    time.sleep(60)\n"
              "weights.tensors[last] = weights.tensors[last]._replace(read=hang)\n"
              "convert.write(weights, sys.argv[2], 'meta')\n")
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "hf", tmp_path / "out"],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp", "hf"]
    convert(tmp_path / "hf", tmp_path / "out", "meta")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]
    assert same_weights(lx.hf.load(tmp_path / "out"), lx.hf.load(tmp_path / "hf"))


@pytest.mark.parametrize("to", convert_module.FORMATS)
def test_failed_write_is_one_sentence_and_leaves_nothing(to, tmp_path, monkeypatch):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LlamaExtError, match="out cannot be written: No space left on device"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


# --- tokenizer, command line ---

def test_tokenizer_travels_and_the_result_generates(tokenizer, tmp_path, capsys):
    config = dataclasses.replace(CONFIGS["llama 1"], vocab_size=300)
    lx.hf.save(ours(config), tmp_path / "hf", tokenizer=tokenizer.parent)
    hf_config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert hf_config["bos_token_id"] == Tokenizer(tokenizer).bos_id
    assert convert(tmp_path / "hf", tmp_path / "meta", "meta") is None
    assert cli.main(["convert", str(tmp_path / "meta"), str(tmp_path / "ours"),
                     "--to", "ours"]) == 0
    assert capsys.readouterr().out == f"model: {tmp_path / 'ours'}\n"
    model, loaded = checkpoint.load_model(tmp_path / "ours")
    assert same_weights(model, ours(config)) and loaded.vocab_size == 290
    assert cli.main(["generate", "--run", str(tmp_path / "ours"), "--prompt", "one",
                     "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("one")


def test_what_generation_lacks_is_said(tmp_path, capsys):
    lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf")
    assert cli.main(["convert", str(tmp_path / "hf"), str(tmp_path / "a"), "--to", "ours"]) == 0
    assert "note: generate needs tokenizer.model" in capsys.readouterr().out
    (tmp_path / "hf" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's
    assert "another kind" in convert(tmp_path / "hf", tmp_path / "b", "ours")
    assert not (tmp_path / "b" / "tokenizer.model").exists()
    assert "another kind" in convert(tmp_path / "hf", tmp_path / "c", "hf")
    assert (tmp_path / "c" / "tokenizer.model").exists()


def test_tokenizer_with_more_pieces_than_embeddings(tokenizer, tmp_path):
    with pytest.raises(LlamaExtError, match="expected at most vocab_size = 101 pieces, got 290"):
        lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf", tokenizer=tokenizer.parent)
    assert not list(tmp_path.iterdir())


# --- bad input ---

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
    "head_dim": (edited(lambda c: c.update(head_dim=32)), "head_dim: expected"),
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
