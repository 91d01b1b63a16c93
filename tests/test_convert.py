"""Weights between Hugging Face's, Meta's and our format: the same bits, in bounded memory."""

import dataclasses
import json
import os
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
from hf_models import CONFIGS, even_vocabulary, ours, same_weights, save_meta, theirs
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
    way = ("ours", "meta", "hf", "meta", "ours", "hf")
    if config.q_dim != config.dim:  # Meta's format cannot say so
        way = ("ours", "hf", "ours", "ours", "ours", "hf")
    for step, to in enumerate(way, 1):
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
    assert "note: generate needs tokenizer.model or tokenizer.json" in capsys.readouterr().out
    (tmp_path / "hf" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3's, damaged
    for to in convert_module.FORMATS:
        lacks = convert(tmp_path / "hf", tmp_path / f"to-{to}", to)
        assert "generate cannot use the tokenizer: " in lacks and "a token for every byte" in lacks
        assert (tmp_path / f"to-{to}" / "tokenizer.model").read_text() == "IQ== 0\nIg== 1\n"


def test_a_runs_newest_checkpoint_converts(tokenizer, tmp_path, capsys):
    model = ours(dataclasses.replace(CONFIGS["llama 3 tied"], vocab_size=300), torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.save(tmp_path / "run", 1, ours(model.config), optimizer,
                    tokenizer=tokenizer.read_bytes())
    checkpoint.save(tmp_path / "run", 2, model, optimizer, tokenizer=tokenizer.read_bytes())
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert same_weights(lx.hf.load(tmp_path / "hf"), model)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert hf.dtype == torch.bfloat16
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_tokenizer_with_more_pieces_than_embeddings(tokenizer, tmp_path):
    with pytest.raises(LlamaExtError, match="expected at most vocab_size = 101 pieces, got 290"):
        lx.hf.save(ours(CONFIGS["llama 1"]), tmp_path / "hf", tokenizer=tokenizer.parent)
    assert not list(tmp_path.iterdir())
