"""prepare: what a data set holds, what is held out, and that failures leave the old one whole."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from corpus import flip_bit, full_disk, write_texts
from llama_ext import documents as documents_module
from llama_ext import prepare as prepare_module
from llama_ext.data import load_meta, verify
from llama_ext.errors import LlamaExtError
from llama_ext.prepare import prepare
from llama_ext.tokenizer import Tokenizer

SMALL = {"vocab_size": 320, "val_fraction": 0.2, "progress": False}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def data(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    prepare([texts], out, **SMALL)
    return out


def tokens(out, split):
    meta = load_meta(out)
    shards = [np.fromfile(out / meta["folder"] / name, f"<u{4 if meta['dtype'] == 'uint32' else 2}")
              for name in meta[split]["shards"]]
    return np.concatenate(shards).tolist()


def documents(out, split):
    """The texts of a split, each of which must stand between bos and eos."""
    tokenizer = Tokenizer(out / load_meta(out)["folder"] / "tokenizer.model")
    texts, ids = [], tokens(out, split)
    while ids:
        end = ids.index(tokenizer.eos_id)
        assert ids[0] == tokenizer.bos_id
        texts.append(tokenizer.decode(ids[1:end]))
        ids = ids[end + 1:]
    return texts


def contents(out):
    """Every file of the data set, byte for byte."""
    verify(out)
    meta = load_meta(out)
    return {name: (out / meta["folder"] / name).read_bytes() for name in meta["files"]}


def test_every_document_is_whole_in_one_split(texts, data):
    train, val = documents(data, "train"), documents(data, "val")
    assert sorted(train + val) == sorted(path.read_text() for path in texts.iterdir())
    meta = load_meta(data)
    assert (data / meta["folder"] / "val.txt").read_text() == "".join(val)
    for split, held in (("train", train), ("val", val)):
        assert meta[split]["documents"] == len(held)
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in held)
        assert meta[split]["tokens"] == len(tokens(data, split))
    share = meta["val"]["bytes"] / (meta["val"]["bytes"] + meta["train"]["bytes"])
    assert 0.15 < share <= 0.2
    verify(data)


def test_result_depends_on_contents_only(texts, data, tmp_path):
    for i, path in enumerate(sorted(texts.iterdir(), reverse=True)):
        target = tmp_path / "moved" / "ab"[i % 2] / f"{i}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    prepare([tmp_path / "moved/b", tmp_path / "moved/a"], tmp_path / "out", **SMALL)
    assert contents(tmp_path / "out") == contents(data)
    assert load_meta(tmp_path / "out") == load_meta(data)
    prepare([texts], tmp_path / "other", **SMALL, seed=1)
    assert sorted(documents(tmp_path / "other", "val")) != sorted(documents(data, "val"))


def test_files_read_in_small_blocks_give_the_same(texts, data, tmp_path, monkeypatch):
    """Blocks cut characters of several bytes, and batches cut documents."""
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("é\U0001f600 naïve\n" * (3 + i))
    shutil.copy(data / load_meta(data)["folder"] / "tokenizer.model", tmp_path / "t.model")
    inputs = sorted(tmp_path.glob("*.txt"))
    for module in (prepare_module, documents_module):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(prepare_module, "_BATCH", 20)
    prepare(inputs, tmp_path / "out", tokenizer=tmp_path / "t.model", val_fraction=0,
            progress=False)
    assert sorted(documents(tmp_path / "out", "train")) == sorted(p.read_text() for p in inputs)


def test_what_is_not_text_is_skipped_and_counted(texts, tmp_path):
    folder = tmp_path / "in"
    shutil.copytree(texts, folder)
    (folder / "latin1.txt").write_bytes("café".encode("latin-1"))
    (folder / "cut.txt").write_bytes("café".encode()[:-1])
    (folder / "binary.txt").write_bytes(b"a\0b")
    (folder / "empty.txt").write_bytes(b"")
    shutil.copy(folder / "text003.txt", folder / "copy.txt")
    for name in ("image.png", ".hidden.txt", ".git/config.txt", "out/old.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not to be found\n" * 9)
    (folder / "loop").symlink_to(folder)
    meta = prepare([folder], folder / "out", **SMALL)
    assert meta["skipped"] == {"not_text": 3, "empty": 1, "duplicate": 1, "short": 0}
    assert meta["train"]["documents"] + meta["val"]["documents"] == 40


def test_files_named_are_taken_whatever_their_suffix(tmp_path, data):
    write_texts(tmp_path, 3)
    (tmp_path / "text000.txt").rename(tmp_path / "text.xyz")
    model = data / load_meta(data)["folder"] / "tokenizer.model"
    options = {"tokenizer": model, "val_fraction": 0, "progress": False}
    assert prepare(tmp_path / "text.xyz", tmp_path / "a", **options)["train"]["documents"] == 1
    assert prepare(tmp_path, tmp_path / "b", **options)["train"]["documents"] == 2
    assert prepare(tmp_path, tmp_path / "c", suffixes=[".xyz"],
                   **options)["train"]["documents"] == 1


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    text = "".join(f"line {i} of the only document\n" for i in range(2000))
    (tmp_path / "one.txt").write_text(text)
    meta = prepare([tmp_path / "one.txt"], tmp_path / "out", **SMALL)
    train = tokens(tmp_path / "out", "train")
    val = (tmp_path / "out" / meta["folder"] / "val.txt").read_text()
    assert text.endswith(val) and val.startswith("line ") and 0.18 < len(val) / len(text) < 0.2
    tokenizer = Tokenizer(tmp_path / "out" / meta["folder"] / "tokenizer.model")
    assert tokenizer.decode(train) + tokenizer.decode(tokens(tmp_path / "out", "val")) == text


def test_shards_have_the_size_asked_for(texts, data, tmp_path):
    meta = prepare([texts], tmp_path, **SMALL, shard_tokens=1000)
    sizes = [meta["files"][name]["bytes"] for name in meta["train"]["shards"]]
    assert sizes[:-1] == [2000] * (len(sizes) - 1) and 0 < sizes[-1] <= 2000
    assert tokens(tmp_path, "train") == tokens(data, "train")


def test_a_large_vocabulary_takes_uint32(texts, data, tmp_path, monkeypatch):
    class Large(Tokenizer):
        def __init__(self, path):
            super().__init__(path)
            self.vocab_size = (1 << 16) + 1
            self.encode_batch = lambda texts, threads: [[1 << 16] * len(text) for text in texts]

    monkeypatch.setattr(prepare_module, "Tokenizer", Large)
    model = data / load_meta(data)["folder"] / "tokenizer.model"
    meta = prepare([texts], tmp_path, tokenizer=model, progress=False)
    assert meta["dtype"] == "uint32" and max(tokens(tmp_path, "train")) == 1 << 16


def test_the_same_again_does_nothing_and_damage_is_repaired(texts, data, tmp_path):
    prepare([texts], tmp_path, **SMALL)
    before, inode = contents(tmp_path), os.stat(tmp_path / "meta.json").st_ino
    prepare([texts], tmp_path, **SMALL)
    assert os.stat(tmp_path / "meta.json").st_ino == inode
    flip_bit(tmp_path / load_meta(tmp_path)["folder"] / "train-00000.bin")
    prepare([texts], tmp_path, **SMALL)
    assert contents(tmp_path) == before


def test_other_options_replace_the_data_set_and_leave_nothing_of_the_old(texts, tmp_path):
    prepare([texts], tmp_path, **SMALL)
    prepare([texts], tmp_path, **{**SMALL, "vocab_size": 340})
    meta = load_meta(tmp_path)
    assert meta["vocab_size"] == 340
    assert sorted(os.listdir(tmp_path)) == sorted([meta["folder"], "meta.json"])


def _prepare_in_child(texts, out, before=""):
    """Run prepare with another vocabulary in another process, after the statements `before`."""
    script = ("import os, sys, time\nfrom pathlib import Path\n"
              "from llama_ext import prepare as p\n" + before + "\n"
              "p.prepare([sys.argv[1]], sys.argv[2], vocab_size=340, val_fraction=0.2)")
    return subprocess.run([sys.executable, "-c", script, texts, out]).returncode


@pytest.mark.parametrize("place", [
    "p._encode = lambda *args: os._exit(9)", "p._publish = lambda *args: os._exit(9)",
    "os.rename = lambda *args: os._exit(9)", "p.write_atomically = lambda *args: os._exit(9)",
    "os.replace = lambda a, b: os._exit(9) if b.name == 'meta.json' else os.rename(a, b)"])
def test_killed_anywhere_it_leaves_the_old_data_set(texts, data, tmp_path, place):
    """The process ends, without any clean-up, at each step from encoding to the last rename."""
    out = tmp_path / "out"
    shutil.copytree(data, out)
    assert _prepare_in_child(texts, out, place) == 9
    assert contents(out) == contents(data)
    prepare([texts], out, **{**SMALL, "vocab_size": 340})
    assert load_meta(out)["vocab_size"] == 340
    assert sorted(os.listdir(out)) == sorted([load_meta(out)["folder"], "meta.json"])


@pytest.mark.parametrize("room", [0, 1000, 4000, 9000])
def test_a_full_disk_leaves_the_old_data_set(texts, data, tmp_path, room):
    out = tmp_path / "out"
    shutil.copytree(data, out)
    with full_disk(room), pytest.raises(LlamaExtError, match="out.*: .*File too large"):
        prepare([texts], out, **{**SMALL, "vocab_size": 340})
    assert contents(out) == contents(data)
    assert sorted(os.listdir(out)) == sorted([load_meta(out)["folder"], "meta.json"])


def test_only_one_prepare_at_a_time(texts, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(LlamaExtError, match="another prepare is writing here"):
        prepare([texts], tmp_path, **SMALL)
    os.close(fd)
    prepare([texts], tmp_path, **SMALL)


def test_bad_input_is_one_sentence(texts, tmp_path):
    out = tmp_path / "out"
    for inputs, message in ((["nowhere"], "nowhere: expected a text file, a folder or the word"),
                            ([out], "that is not an input too")):
        out.mkdir(exist_ok=True)
        with pytest.raises(LlamaExtError, match=message):
            prepare(inputs, out, **SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LlamaExtError, match="no text found in .*empty .skipped"):
        prepare([tmp_path / "empty"], out, **SMALL)
    with pytest.raises(LlamaExtError, match="vocab_size: expected at most .* got 99999"):
        prepare([texts], out, **{**SMALL, "vocab_size": 99999})
    with pytest.raises(LlamaExtError, match="none.model: cannot read the tokenizer"):
        prepare([texts], out, tokenizer=tmp_path / "none.model")
    (tmp_path / "file").write_text("")
    with pytest.raises(LlamaExtError, match="file.*: cannot prepare the data: "):
        prepare([texts], tmp_path / "file", **SMALL)
    for option, value in (("val_fraction", 1.0), ("shard_tokens", 0)):
        with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
            prepare([texts], out, **{**SMALL, option: value})
    assert os.listdir(out) == []


def test_the_word_stdlib_is_this_pythons_library():
    found = list(documents_module.find(["stdlib"], (), prepare_module.Path("out")))
    assert prepare_module.Path(json.__file__) in found and len(found) > 300
    assert not [path for path in found if "site-packages" in path.parts or "test" in path.parts]
