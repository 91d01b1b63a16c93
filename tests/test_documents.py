"""documents: every format and compression gives the same documents, and what is wrong with a file
is one sentence that names it; prepare on them."""

import bz2
import gzip
import json
import lzma
import random
import tracemalloc

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from corpus import WORDS, halve, write_texts
from llama_ext import cli, documents
from llama_ext import prepare as prepare_module
from llama_ext.data import load_meta
from llama_ext.documents import find, read_documents
from llama_ext.errors import LlamaExtError
from llama_ext.prepare import prepare
from llama_ext.tokenizer import Tokenizer

TEXTS = ["first\nof three lines\n", "", "naïve café \U0001f600 " * 50, "\u2028 one \" \\ line \r\n"]


def compress_zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
            ".zst": compress_zstd}


def json_lines(texts, key="text", **options):
    return "".join(json.dumps({"id": 1, key: text}, **options) + "\n" for text in texts).encode()


def write_parquet(path, texts, key="text", kind=None, **options):
    column = pyarrow.array(texts, kind or pyarrow.string())
    table = pyarrow.table({"id": list(range(len(texts))), key: column})
    parquet.write_table(table, path, **options)
    return path


def read(path, key="text"):
    return [b"".join(blocks) for blocks in read_documents(path, key)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks that cut lines and characters, batches that cut row groups."""
    monkeypatch.setattr(documents, "BLOCK", 5)
    monkeypatch.setattr(documents, "_ROWS", 3)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_text_and_json_lines_in_every_compression(tmp_path, small_blocks, suffix):
    compress = COMPRESS[suffix]
    for text in TEXTS:
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(text.encode()))
        assert read(path) == [text.encode()]
    for name in ("a.jsonl", "a.ndjson"):
        for ascii_only in (True, False):
            data = json_lines(TEXTS, ensure_ascii=ascii_only)
            for data in (data, data[:-1], b"\n" + data.replace(b"\n", b" \r\n\n")):
                path = tmp_path / (name + suffix)
                path.write_bytes(compress(data))
                assert read(path) == [text.encode() for text in TEXTS]
    if suffix:  # files put together are one file
        (tmp_path / f"b.txt{suffix}").write_bytes(compress(b"abc\n") + compress(b"def\n"))
        assert read(tmp_path / f"b.txt{suffix}") == [b"abc\ndef\n"]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
@pytest.mark.parametrize("row_group_size", [1, 4, 100])
def test_parquet(tmp_path, small_blocks, kind, row_group_size):
    path = write_parquet(tmp_path / "a.parquet", TEXTS * 3, "content", kind,
                         row_group_size=row_group_size)
    assert read(path, "content") == [text.encode() for text in TEXTS * 3]


def test_null_is_an_empty_document(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a", None])
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}')
    assert (read(path), read(tmp_path / "a.jsonl")) == ([b"a", b""], [b"", b"a"])


def test_invalid_text_comes_as_invalid_bytes(tmp_path):
    """In a JSON string: bytes that are not UTF-8, and half a surrogate pair."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud83d"}\n{"text": "\\ud83d\\ude00"}\n')
    *invalid, whole = read(path)
    for text in invalid:
        with pytest.raises(UnicodeDecodeError):
            text.decode()
    assert whole.decode() == "\U0001f600"
    column = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [b"caf\xe9"]


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: expected JSON: "), ("[" * 100_000, "line 2: expected JSON: "),
    ('{"body": "x", "id": 1}', "line 2: expected an object with the key 'text' "
                               r"\(see --text-key\), got the keys body, id"),
    ('["text"]', r"line 2: expected an object with the key 'text' .*, got \['text'\]"),
    ('{"text": 7}', "line 2: text: expected a string, got 7")])
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(LlamaExtError, match=f"a.jsonl: {message}"):
        read(path)


def test_a_wrong_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    with pytest.raises(LlamaExtError, match="a.parquet: expected a column 'body' .*got id, text"):
        read(path, "body")
    with pytest.raises(LlamaExtError, match="a.parquet: id: expected a column of strings, got int"):
        read(path, "id")
    halve(path)
    with pytest.raises(LlamaExtError, match="a.parquet: cannot read: "):
        read(path)


@pytest.mark.parametrize("suffix", [s for s in COMPRESS if s])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    noise = random.Random(0).randbytes(5000)
    path.write_bytes(COMPRESS[suffix](noise))
    halve(path)
    with pytest.raises(LlamaExtError, match=f"a.txt{suffix}: cannot read: "):
        read(path)
    path.write_bytes(noise)
    with pytest.raises(LlamaExtError, match=f"a.txt{suffix}: cannot read: "):
        read(path)
    with pytest.raises(LlamaExtError, match=f"b{suffix}: cannot read: "):
        read(tmp_path / f"b{suffix}")


def test_folders_are_searched_for_every_format(tmp_path):
    names = ["a.txt", "b.jsonl", "c.ndjson.gz", "d.parquet", "e.md.zst", "f.py.xz", "g.txt.bz2"]
    for name in [*names, "x.gz", "y.png.gz", "z.jpg", ".h.txt.gz"]:
        (tmp_path / name).write_bytes(b"")
    out = tmp_path / "out"
    assert [p.name for p in find([tmp_path], documents.SUFFIXES, out)] == names
    assert [p.name for p in find([tmp_path], (".txt",), out)] == ["a.txt", "g.txt.bz2"]


def test_every_format_gives_the_same_data_set(tmp_path):
    paths = write_texts(tmp_path / "texts")
    texts = [path.read_text() for path in paths]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[:9], "body")))
    write_parquet(tmp_path / "b.parquet", texts[9:20], "body", row_group_size=4)
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts[20:39] + texts[:5], "body"))
    (tmp_path / "d.txt.zst").write_bytes(compress_zstd(texts[39].encode()))
    inputs = [tmp_path / name for name in ("c.jsonl", "d.txt.zst", "b.parquet", "a.jsonl.gz")]
    options = {"vocab_size": 320, "val_fraction": 0.2, "progress": False}
    files = prepare([tmp_path / "texts"], tmp_path / "x", **options)
    other = prepare(inputs, tmp_path / "y", text_key="body", **options)
    assert other.pop("skipped") == {"not_text": 0, "empty": 0, "duplicate": 5, "short": 0}
    assert files.pop("skipped") == {"not_text": 0, "empty": 0, "duplicate": 0, "short": 0}
    assert other == files  # with the checksums of every file
    assert sorted(p.name for p in (tmp_path / "y").iterdir()) == sorted(
        [load_meta(tmp_path / "y")["folder"], "meta.json"])


def test_the_end_of_a_large_document_among_others_is_held_out(tmp_path):
    """It is cut where it stands in the file that holds all documents."""
    large = "".join(f"line {i} of the large document\n" for i in range(2000))
    (tmp_path / "a.jsonl").write_bytes(json_lines(["before " * 9, large, "after " * 9]))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=320, val_fraction=0.1,
                   progress=False)
    val = (tmp_path / "out" / meta["folder"] / "val.txt").read_text()
    assert val.count("of the large document\n") > 100
    assert large.endswith(val[val.index("line "):]) or large.endswith(
        val.removeprefix("before " * 9).removeprefix("after " * 9))
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(large) + 9 * (7 + 6)


def test_a_document_without_lines_among_others_is_cut_at_a_character(tmp_path):
    rng = random.Random(0)
    large = " ".join(rng.choice(WORDS).strip() for _ in range(3000))
    (tmp_path / "a.jsonl").write_bytes(json_lines([large, "line\n" * 9, "last\n" * 9]))
    meta = prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=290, val_fraction=0.3,
                   progress=False)
    val = (tmp_path / "out" / meta["folder"] / "val.txt").read_text()
    held = val.replace("line\n", "").replace("last\n", "")
    assert large.endswith(held) and 0.25 < len(held) / len(large) < 0.3


def test_skipped_documents_take_no_room_and_no_others_place(tmp_path, monkeypatch):
    """Of files of their own and of those in others, in turn."""
    texts = [f"the text of document {i}\n" * 5 for i in range(40)]
    (tmp_path / "a.jsonl").write_bytes(json_lines([t for t in texts[:20] for _ in range(9)]))
    (tmp_path / "b.txt").write_bytes(b"a\0b" * 9)
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts[20:39] + ["", "\ud800"]))
    (tmp_path / "d.txt").write_text(texts[0])
    (tmp_path / "e.txt").write_text(texts[39])
    split, sizes = prepare_module._split, []
    monkeypatch.setattr(prepare_module, "_split", lambda documents, fraction: sizes.append(
        documents.paths[0].stat().st_size) or split(documents, fraction))
    meta = prepare(sorted(tmp_path.iterdir()), tmp_path / "out", vocab_size=290, val_fraction=0,
                   progress=False)
    assert meta["skipped"] == {"not_text": 2, "empty": 1, "duplicate": 161, "short": 0}
    files = tmp_path / "out" / meta["folder"]
    tokenizer = Tokenizer(files / "tokenizer.model")
    ids = np.fromfile(files / "train-00000.bin", "<u2").tolist()
    got = tokenizer.decode(ids)
    assert sorted(got.splitlines()) == sorted("".join(texts).splitlines())
    assert sum(map(len, texts[:39])) <= sizes[0] <= sum(map(len, texts[:39])) + len(texts[0])


def test_a_failed_input_leaves_the_old_data_set(tmp_path):
    write_texts(tmp_path / "texts")
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a" * 1000] * 5) + b"{}\n")
    before = prepare([tmp_path / "texts"], tmp_path / "out", vocab_size=320, progress=False)
    with pytest.raises(LlamaExtError, match="a.jsonl: line 6: expected an object with the key"):
        prepare([tmp_path / "texts", tmp_path / "a.jsonl"], tmp_path / "out", progress=False)
    assert load_meta(tmp_path / "out") == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [before["folder"], "meta.json"])


def test_memory_does_not_grow_with_the_text(tmp_path):
    """4 MB and 32 MB, as lines of 64 kB, compressed: the same peak."""
    line = json_lines(["word " * 13_000])
    peaks = []
    for count in (64, 512):
        path = tmp_path / f"{count}.jsonl.gz"
        path.write_bytes(gzip.compress(line * count, 1))
        tracemalloc.start()
        assert sum(len(b) for blocks in read_documents(path, "text") for b in blocks) > 64_000 * 64
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 6 << 20


def test_the_commands_options_reach_prepare(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"body": f"same line\nlines {i} of â€œtextâ€\x9d " + "word " * i}) + "\n"
        for i in range(1, 60)))
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    code = cli.main(["prepare", str(tmp_path / "a.jsonl"), str(tmp_path / "latin.txt"), "--out",
                     str(tmp_path / "out"), "--vocab-size=290", "--text-key=body", "--fix-text",
                     "--dedup=lines", "--invalid=replace", "--min-chars=30"])
    assert code == 0
    shown = capsys.readouterr().out
    short = load_meta(tmp_path / "out")["skipped"]["short"]
    kept = 60 - short
    assert 1 < short < 9
    assert (f"skipped documents: 0 not text, 0 empty, 0 duplicate, {short} short\n"
            f"cleaned: {kept} documents repaired, {kept - 1} lines removed "
            f"({(kept - 1) * 10} bytes)\n") in shown
