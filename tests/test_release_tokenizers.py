"""The tokenizers of the Llama releases: transformers' ids, exact streaming, what a folder says."""

import base64
import json
import random
import shutil
import tempfile
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers

from llama_ext.errors import LlamaExtError
from llama_ext.release_tokenizers import (JsonTokenizer, RankTokenizer, SentencePieceTokenizer,
                                          load_tokenizer)
from llama_ext.tokenizer import Tokenizer
from release_files import (TEXTS, change, random_texts, write, write_json_tokenizer, write_ranks,
                           write_sentencepiece)

KINDS = ("llama 2", "json", "ranks", "llama 2 json", "ours")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a folder with such a tokenizer}."""
    root = tmp_path_factory.mktemp("tokenizers")
    folders = {"llama 2": write_sentencepiece(root / "llama2"),
               "json": write_json_tokenizer(root / "json")}
    folders["ranks"] = write_ranks(root / "ranks", folders["json"])
    folders["llama 2 json"] = root / "llama2json"
    folders["ours"] = root / "ours"
    hf_tokenizer(folders["llama 2"]).save_pretrained(folders["llama 2 json"])
    folders["ours"].mkdir()
    Tokenizer.train(TEXTS, folders["ours"] / "tokenizer.model", 420)
    return folders


def hf_tokenizer(folder):
    """transformers' own, of the files in `folder` and those that load_tokenizer() says it needs."""
    with tempfile.TemporaryDirectory() as copy:
        for name, content in load_tokenizer(folder).hf_files().items():
            write(Path(copy), name, content)
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        return transformers.AutoTokenizer.from_pretrained(copy, split_special_tokens=True)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(folders, kind):
    return load_tokenizer(folders[kind])


def test_kinds(folders):
    kinds = [type(load_tokenizer(folders[kind])) for kind in KINDS]
    assert kinds == [SentencePieceTokenizer, JsonTokenizer, RankTokenizer, JsonTokenizer, Tokenizer]


# --- text to ids ---

def test_ids_and_texts_are_transformers(folders, tokenizer, kind):
    theirs = hf_tokenizer(folders[kind])
    assert theirs.bos_token_id == tokenizer.bos_id
    assert theirs.eos_token_id == tokenizer.eos_id in tokenizer.eos_ids
    texts = random_texts(400)
    for text in texts:
        if kind == "llama 2" and text.startswith(" "):
            continue  # transformers loses a space there: the test below
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.encode(text, bos=True) == theirs.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == theirs.decode(
            theirs.encode(text), skip_special_tokens=True), text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_llama_2s_are_sentencepieces(folders):
    """With the spaces at the beginning that transformers 5 takes for the one put before a text."""
    sp = sentencepiece.SentencePieceProcessor(str(folders["llama 2"] / "tokenizer.model"))
    tokenizer = load_tokenizer(folders["llama 2"])
    theirs = hf_tokenizer(folders["llama 2"])
    for text in [" x", "   def area", "\u2581x", *random_texts(200, seed=1)]:
        ids = tokenizer.encode(text)
        assert ids == sp.encode(text)
        assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert theirs.decode(theirs.encode(" x", add_special_tokens=False)) == "x"


def test_round_trips(tokenizer, kind):
    for text in random_texts(300, seed=2):
        if kind == "llama 2 json" and text.startswith(" "):
            continue
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_text_never_becomes_a_control_token(tokenizer):
    special = {tokenizer.bos_id, *tokenizer.eos_ids}
    for text in ("<s>", "</s>x", "<|begin_of_text|>", "a<|eot_id|>b", "<|end_of_text|>"):
        ids = tokenizer.encode(text)
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text


def test_special_tokens_on_request(folders, tokenizer, kind):
    """Once a text is said to have some; transformers' rule, too, unless told otherwise."""
    theirs = hf_tokenizer(folders[kind])
    theirs.split_special_tokens = False
    bos, eos = theirs.bos_token, theirs.eos_token
    for text in (f"{bos}x", f"a{eos}b", f"x {eos}{eos} y{bos}", f"{eos}", "no", ""):
        assert tokenizer.encode(text, special=True) == theirs.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(text, bos=True, special=True)
        assert ids[0] == tokenizer.bos_id
        assert ids.count(tokenizer.bos_id) == text.count(bos) + (not text.startswith(bos))
    with pytest.raises(ValueError, match="encode: .* lone surrogate"):
        tokenizer.encode("\ud800", special=True)


def test_a_continuation_gets_no_space_before_it(tokenizer):
    for text in random_texts(200, seed=3):
        start = tokenizer.encode("x", bos=True)
        assert tokenizer.decode(start + tokenizer.encode_continuation(text)) == "x" + text


def test_wrong_arguments(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_continuation):
        with pytest.raises(ValueError, match=r"encode: .*lone surrogate '\\ud800' at character 2"):
            encode("ab\ud800")
        with pytest.raises(TypeError, match="encode: text must be a str, got bytes"):
            encode(b"ab")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"\[0, {tokenizer.vocab_size}\), got {bad}"):
            tokenizer.decode([5, bad])


# --- ids to text, one by one ---

def test_a_stream_is_the_text_after_what_was_shown(tokenizer):
    rng = random.Random(0)
    for text in random_texts(200, seed=4):
        ids = tokenizer.encode(text, bos=True)
        assert "".join(tokenizer.stream_decode(ids)) == tokenizer.decode(ids)
        cut = rng.randrange(len(ids) + 1)
        shown = tokenizer.stream_decoder()
        before = "".join(map(shown, ids[:cut]))
        step = tokenizer.stream_decoder(ids[:cut])
        pieces = [step(i) for i in [*ids[cut:], None]]
        assert before + "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


def test_streams_of_any_ids_are_decode(tokenizer):
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(9))]
        assert "".join(tokenizer.stream_decode(iter(ids))) == tokenizer.decode(ids)


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode_continuation("\U00020000")  # in no training text: a token a byte
    assert len(ids) == 4
    step = tokenizer.stream_decoder(tokenizer.encode("x"))
    assert [step(i) for i in [*ids, *ids[:2], None]] == ["", "", "", "\U00020000", "", "", "\ufffd"]


def test_the_space_of_llama_2s_pieces(folders):
    """Gone at the beginning of a text, shown in the middle of one."""
    for kind in ("llama 2", "llama 2 json"):
        tokenizer = load_tokenizer(folders[kind])
        ids = tokenizer.encode("def")
        assert tokenizer.decode(ids) == "def"
        for before, text in (([], "def"), ([tokenizer.bos_id], "def"),
                             (tokenizer.encode("x", bos=True), " def")):
            step = tokenizer.stream_decoder(before)
            assert "".join(map(step, ids)) == text


# --- what the files say ---

def test_eos_of_every_file_counts(folders, tmp_path):
    count = load_tokenizer(folders["ranks"]).vocab_size - 256
    json_folder = write_json_tokenizer(tmp_path / "json", eos="<|eot_id|>", generation=(1, 3))
    tokenizer = load_tokenizer(json_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (count, count + 2)
    assert tokenizer.eos_ids == (count + 2, count + 1, count + 3)
    (json_folder / "generation_config.json").unlink()
    assert load_tokenizer(json_folder).eos_ids == (count + 2,)
    (json_folder / "tokenizer_config.json").rename(json_folder / "special_tokens_map.json")
    assert load_tokenizer(json_folder).eos_ids == (count + 2,)
    (json_folder / "special_tokens_map.json").unlink()
    write(json_folder, "config.json", {"eos_token_id": [count + 1], "bos_token_id": count})
    assert load_tokenizer(json_folder).eos_ids == (count + 1,)
    (json_folder / "config.json").unlink()
    with pytest.raises(LlamaExtError, match="json: expected an eos token in it or in the files"):
        load_tokenizer(json_folder)
    write(json_folder, "generation_config.json", {"eos_token_id": [count + 9]})
    with pytest.raises(LlamaExtError, match=rf"eos_token_id: expected ids below its {count + 4}, "
                                            rf"got {count + 9}"):
        load_tokenizer(json_folder)
    shutil.copy(folders["ranks"] / "tokenizer.model", tmp_path)
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, count + 9]})
    assert load_tokenizer(tmp_path).eos_ids == (count + 1, count + 8, count + 9, 7)
    ranks = load_tokenizer(folders["ranks"])
    assert (ranks.bos_id, ranks.eos_ids) == (count, (count + 1, count + 8, count + 9))


def test_whether_texts_begin_with_bos(tmp_path):
    folder = write_json_tokenizer(tmp_path / "json")
    bos = load_tokenizer(folder).bos_id
    assert load_tokenizer(folder).encode("x", bos=True)[0] == bos
    change(folder, "tokenizer_config.json", add_bos_token=False)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("x", bos=True) == tokenizer.encode("x") != []
    assert tokenizer.encode("", bos=True) == [bos] and tokenizer.encode("") == []
    change(folder, "tokenizer_config.json", add_bos_token=None)
    change(folder, "tokenizer.json", post_processor=None)
    assert load_tokenizer(folder).encode("x", bos=True) == tokenizer.encode("x")
    change(folder, "tokenizer_config.json", bos_token=None)
    change(folder, "generation_config.json", bos_token_id=None)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("", bos=True) == [tokenizer.eos_id]


def test_special_tokens_of_llama_3(folders):
    tokenizer = load_tokenizer(folders["ranks"])
    added = tokenizers.Tokenizer.from_str(json.dumps(
        tokenizer.hf_files()["tokenizer.json"])).get_added_tokens_decoder()
    first = tokenizer.vocab_size - 256
    names = [added[first + i].content for i in range(256)]
    assert sorted(added) == [*range(first, first + 256)] and len(set(names)) == 256
    assert names[6:11] == ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
                           "<|python_tag|>"]
    assert names[255] == "<|reserved_special_token_247|>"


def test_ranks_are_the_merges_they_came_from(folders):
    """Found again without them, with the split pattern that transformers has for Llama 3."""
    a, b = (load_tokenizer(folders[kind]) for kind in ("json", "ranks"))
    for text in [*TEXTS, *random_texts(300, seed=5)]:
        assert a.encode(text) == b.encode(text)


def test_ranks_as_tiktoken_reads_them(tmp_path):
    """A whole piece is its token, even one that no merges lead to; else the neighbours with the
    least rank are merged first, the leftmost of several."""
    tokens = [*(bytes([b]) for b in range(256)), b"xyz", b"bc", b"ab", b"aa", b"abc", b"12"]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(
        base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    tokenizer = load_tokenizer(tmp_path)
    for text, pieces in (("xyz", [b"xyz"]), ("xyzx", [b"x", b"y", b"z", b"x"]), ("abc", [b"abc"]),
                         ("dabc", [b"d", b"abc"]), ("abcd", [b"abc", b"d"]), ("aaa", [b"aa", b"a"]),
                         ("aab", [b"a", b"ab"]), ("1212", [b"12", b"1", b"2"])):
        assert [tokens[i] for i in tokenizer.encode(text)] == pieces


# --- damaged and other files ---

@pytest.mark.parametrize("lines, message", [
    (b"IQ== 0\nIg==\n", r"line 2: expected a token in base64, a space and its rank, got b'Ig=='"),
    (b"IQ== 0\nIg= 1\n", "line 2: expected a token in base64"),
    (b"IQ== 0\nIg== 2\n", "expected 2 tokens with the ranks 0 to 1, each once"),
    (b"IQ== 0\nIQ== 1\n", "expected 2 tokens with the ranks 0 to 1, each once"),
    (b"IQ== 0\nIg== 1\n", "expected a token for every byte, found none for 0x00")])
def test_damaged_ranks(lines, message, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(lines)
    with pytest.raises(LlamaExtError, match=f"tokenizer.model: {message}"):
        load_tokenizer(tmp_path)


def test_damaged_or_missing(folders, tmp_path):
    with pytest.raises(LlamaExtError, match="expected tokenizer.model or tokenizer.json, found ne"):
        load_tokenizer(tmp_path)
    data = (folders["llama 2"] / "tokenizer.model").read_bytes()
    for damaged in (b"", b"\n", data[:-1], data[:99]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(LlamaExtError, match="not a SentencePiece model, or a damaged one"):
            load_tokenizer(tmp_path)
    for text, message in (("{", "expected JSON"), ("[]", "expected a JSON object"),
                          ("{}", "not a tokenizer.json that the tokenizers library can read")):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(LlamaExtError, match=f"tokenizer.json: {message}"):
            load_tokenizer(tmp_path)


def test_other_decoders_are_refused(tmp_path):
    folder = write_json_tokenizer(tmp_path / "json")
    change(folder, "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(LlamaExtError, match="decoder: expected ByteLevel, .* got WordPiece"):
        load_tokenizer(folder)
    change(folder, "tokenizer.json", decoder=None)
    with pytest.raises(LlamaExtError, match="decoder: expected ByteLevel, .* got None"):
        load_tokenizer(folder)


def test_a_sentencepiece_model_without_eos(tmp_path):
    folder = write_sentencepiece(tmp_path / "sp", eos_id=-1)
    with pytest.raises(LlamaExtError, match="tokenizer.model: expected an eos token"):
        load_tokenizer(folder)


@pytest.mark.parametrize("pre_tokenizer, normalizer", [
    ({"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
     None),
    (None, {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]})])
def test_every_way_to_put_a_space_before_a_text(folders, tmp_path, pre_tokenizer, normalizer):
    folder = tmp_path / "json"
    hf_tokenizer(folders["llama 2"]).save_pretrained(folder)
    change(folder, "tokenizer.json", pre_tokenizer=pre_tokenizer, normalizer=normalizer)
    tokenizer = load_tokenizer(folder)
    for text in random_texts(100, seed=6):
        start = tokenizer.encode("x", bos=True)
        assert tokenizer.decode(start + tokenizer.encode_continuation(text)) == "x" + text
        if normalizer or not text.startswith(" "):
            assert tokenizer.decode(tokenizer.encode(text)) == text
