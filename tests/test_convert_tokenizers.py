"""Tokenizers on their way through conversions: `generate`, `eval` and transformers read them."""

import dataclasses
import json
import shutil

import pytest
import torch
import transformers

import llama_ext as lx
from hf_models import CONFIGS, ours, save_meta
from llama_ext import LlamaExtError, checkpoint, cli
from llama_ext.convert import convert
from llama_ext.evaluate import LanguageModel
from llama_ext.generate import generate, generate_text, stream_text
from llama_ext.release_tokenizers import load_tokenizer
from llama_ext.tokenizer import Tokenizer
from release_files import (TEXTS, change, random_texts, write_json_tokenizer, write_ranks,
                           write_sentencepiece)

KINDS = ("llama 2", "json", "ranks", "ours")
VOCABULARY = 1000  # more than any of them has
CONFIG = dataclasses.replace(CONFIGS["llama 2 GQA"], vocab_size=VOCABULARY)
OPTIONS = {"temperature": 1.5, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a folder with such a tokenizer}."""
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {"llama 2": write_sentencepiece(root / "llama2"),
               "json": write_json_tokenizer(root / "json"), "ours": root / "ours"}
    folders["ranks"] = write_ranks(root / "ranks", folders["json"])
    folders["ours"].mkdir()
    Tokenizer.train(TEXTS, folders["ours"] / "tokenizer.model", 420)
    return folders


@pytest.fixture(scope="module")
def converted(folders, tmp_path_factory):
    """{kind: a checkpoint with such a tokenizer}, converted from Hugging Face's format."""
    root = tmp_path_factory.mktemp("converted")
    for kind, folder in folders.items():
        lx.hf.save(ours(CONFIG), root / f"{kind} hf", tokenizer=folder)
        assert convert(root / f"{kind} hf", root / kind, "ours") is None
    return {kind: root / kind for kind in folders}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def same_tokenizer(a, b):
    texts = ["", *random_texts(40)]
    ids = [a.encode(text, bos=True, eos=True) for text in texts]
    return (ids == [b.encode(text, bos=True, eos=True) for text in texts]
            and [*map(a.decode, ids)] == [*map(b.decode, ids)]
            and (a.bos_id, a.eos_ids, a.vocab_size) == (b.bos_id, b.eos_ids, b.vocab_size))


# --- conversions ---

@pytest.mark.parametrize("start", ["hf", "meta"])
def test_every_way_round_keeps_the_tokenizer(folders, kind, start, tmp_path):
    first = load_tokenizer(folders[kind])
    folder = tmp_path / "0"
    if start == "hf":
        lx.hf.save(ours(CONFIG), folder, tokenizer=folders[kind])
    else:
        save_meta(ours(CONFIG), folder)
        for file in folders[kind].iterdir():
            shutil.copy(file, folder)
    for step, to in enumerate(("ours", "meta", "hf", "meta", "ours", "hf"), 1):
        assert convert(folder, tmp_path / str(step), to) is None
        folder = tmp_path / str(step)
        assert same_tokenizer(load_tokenizer(folder), first)
        for file in folders[kind].iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_transformers_reads_the_tokenizer_of_a_converted_folder(folders, kind, tmp_path):
    save_meta(ours(CONFIG), tmp_path / "meta")
    for file in folders[kind].iterdir():
        shutil.copy(file, tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", "hf")
    mine = load_tokenizer(folders[kind])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", split_special_tokens=True)
    for text in random_texts(100):
        if kind == "llama 2" and text.startswith(" "):
            continue  # test_release_tokenizers.py
        assert theirs.encode(text) == mine.encode(text, bos=True)
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
    assert theirs.eos_token_id == mine.eos_id
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    eos = model.generation_config.eos_token_id
    assert set(eos if isinstance(eos, list) else [eos]) == set(mine.eos_ids)
    assert model.config.bos_token_id == mine.bos_id


def test_metas_tokenizer_in_the_folder_above(folders, tmp_path):
    shutil.copy(folders["llama 2"] / "tokenizer.model", tmp_path)
    save_meta(ours(CONFIG), tmp_path / "7B")
    assert convert(tmp_path / "7B", tmp_path / "out", "ours") is None
    assert same_tokenizer(load_tokenizer(tmp_path / "out"), load_tokenizer(folders["llama 2"]))
    shutil.copy(folders["ranks"] / "tokenizer.model", tmp_path / "7B")  # its own comes first
    convert(tmp_path / "7B", tmp_path / "own", "hf")
    assert same_tokenizer(load_tokenizer(tmp_path / "own"), load_tokenizer(folders["ranks"]))


def test_a_tokenizer_with_more_ids_than_embeddings(folders, kind, tmp_path, capsys):
    count = load_tokenizer(folders[kind]).vocab_size
    config = dataclasses.replace(CONFIG, vocab_size=count - 1)
    with pytest.raises(LlamaExtError, match=f"expected at most vocab_size = {count - 1} pieces, "
                                            f"got {count}"):
        lx.hf.save(ours(config), tmp_path / "hf", tokenizer=folders[kind])
    assert not list(tmp_path.iterdir())
    lx.hf.save(ours(config), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "ours")
    for file in folders[kind].iterdir():
        shutil.copy(file, tmp_path / "ours")
    for command in ("generate", "eval"):
        assert cli.main([command, "--run", str(tmp_path / "ours")]) == 1
        assert f"pieces, got {count}\n" in capsys.readouterr().err


# --- generation and evaluation ---

def test_generate_shows_what_decoding_the_whole_gives(converted, kind, capsys):
    model, tokenizer = checkpoint.load_model(converted[kind])
    lengths = []
    for prompt in ("def area", "", " x ", "naïve café 😀 12", "日\n"):
        ids = tokenizer.encode(prompt, bos=True)
        new = generate(model, ids, 24, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_ids,
                       **OPTIONS)
        lengths.append(len(new))
        assert cli.main(["generate", "--run", str(converted[kind]), "--prompt", prompt,
                         "--temperature=1.5", "--seed=3", "--max-new-tokens=24",
                         "--top-p=1"]) == 0
        assert capsys.readouterr().out == tokenizer.decode(ids + new) + "\n"
    assert max(lengths) == 24


def test_special_tokens_of_a_prompt(converted, capsys, monkeypatch):
    seen = []

    def ids(model, prompt_ids, *args, **options):
        seen.append(prompt_ids)
        return iter([(0, None)])
    monkeypatch.setattr("llama_ext.generate.stream", ids)
    _, tokenizer = checkpoint.load_model(converted["json"])
    prompt = "<|start_header_id|>user\nx<|eot_id|>"
    for option in ([], ["--special-tokens"]):
        assert cli.main(["generate", "--run", str(converted["json"]), "--prompt", prompt,
                         *option]) == 0
        assert capsys.readouterr().out == prompt + "\n"
    assert seen[1] == [tokenizer.encode(prompt, bos=True)]
    special = tokenizer.special
    assert seen[2] == seen[3] == [[special["<|begin_of_text|>"], special["<|start_header_id|>"],
                                   *tokenizer.encode("user\nx"), special["<|eot_id|>"]]]


def test_stop_texts(converted, kind):
    model, tokenizer = checkpoint.load_model(converted[kind])
    prompts = ["def area", "x"]
    free = generate_text(model, tokenizer, prompts, 40, **OPTIONS)
    for text in free:
        stop = text[len(text) // 2:][:4]
        got = generate_text(model, tokenizer, prompts, 40, stop=[stop], **OPTIONS)
        assert got == [text.split(stop)[0] for text in free]


def test_a_prompt_of_ids_may_end_within_a_character(converted, kind, monkeypatch):
    _, tokenizer = checkpoint.load_model(converted[kind])
    ids = tokenizer.encode("x\U00020000", bos=True)
    monkeypatch.setattr("llama_ext.generate.stream", lambda model, prompts, *args, **options: iter(
        [(0, ids[-2]), (0, ids[-1]), (0, None)]))
    pieces = list(stream_text(None, tokenizer, [ids[:-2]], 2))
    assert pieces == [(0, "\U00020000"), (0, None)]


def test_generation_ends_at_every_eos(folders, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    shutil.copytree(folders["json"], folder)
    tokenizer, prompt = load_tokenizer(folder), "def area"
    ids = tokenizer.encode(prompt, bos=True)
    free = generate(ours(CONFIG), ids, 30, vocab_size=tokenizer.vocab_size, temperature=0)
    first, second = [n for n in range(2, 30) if free[n] not in free[:n]][:2]
    text = None
    for position in (first, second):
        change(folder, "generation_config.json", eos_token_id=[tokenizer.eos_id, free[position]])
        lx.hf.save(ours(CONFIG), tmp_path / f"hf{position}", tokenizer=folder)
        convert(tmp_path / f"hf{position}", tmp_path / f"ours{position}", "ours")
        assert cli.main(["generate", "--run", str(tmp_path / f"ours{position}"), "--prompt",
                         prompt, "--temperature=0"]) == 0
        shorter, text = text, capsys.readouterr().out
        assert text == tokenizer.decode(ids + free[:position]) + "\n" != shorter


def test_eval(converted, kind, tmp_path, capsys):
    assert cli.main(["eval", "--run", str(converted[kind]), "--limit=3", "--num-fewshot=0",
                     "--tasks=builtin_brackets,builtin_addition",
                     "--out", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert 0 <= results["builtin_brackets"]["acc,none"] <= 1
    assert 0 <= results["builtin_addition"]["exact_match,stripped"] <= 1
    assert "builtin_addition" in capsys.readouterr().out


def test_likelihoods_are_of_the_texts_ids(converted, kind):
    """Context and continuation together are the text, whether or not a piece spans the split."""
    model, tokenizer = checkpoint.load_model(converted[kind])
    lm, spans = LanguageModel(model, tokenizer), 0
    for text in random_texts(60, seed=7):
        for at in range(0, len(text) - 1, 3):
            context, new = lm._split(text[:at], text[at:])
            assert context == tokenizer.encode(text[:at], bos=True)
            assert tokenizer.decode(context + new) == text
            spans += context + new != tokenizer.encode(text, bos=True)
    assert spans
