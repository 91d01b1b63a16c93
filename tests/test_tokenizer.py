"""Tokenizer: exact round trips, control tokens, streaming, training limits, damaged files."""

import os
import random

import pytest
import sentencepiece

from llama_ext import tokenizer as tokenizer_module
from llama_ext.errors import LlamaExtError
from llama_ext.tokenizer import Tokenizer

CODE = ("def area(self, r):\n    if r < 0:\n\t\traise ValueError('r')\n"
        "    return 3.14159 * r * r\n\n\n")
TEXTS = [CODE.replace("area", f"area_{i}").replace("r", "rw"[i % 2]) for i in range(200)]
TEXTS += ["<s> naïve café </s> <0x41> <unk> \0 \u2581 \u2585 " * 20]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    Tokenizer.train(TEXTS, path, 400)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return Tokenizer(model_path)


def random_text(rng):
    """Mostly code-like, with every kind of character mixed in."""
    def char():
        while True:
            c = chr(rng.randrange(rng.choice([0x80, 0x3000, 0x110000])))
            if not "\ud800" <= c <= "\udfff":
                return c
    parts = [CODE, "    ", "\t\t", "\n\n", "\r\n", "<s>", "</s>", "<unk>", "<0x0A>", "\0", "\u2581",
             "\u2581\u2581 ", "\u2585", "\ufffd", "\ufeff", "\u2028", " \u2047 ",
             "\U0001f468\u200d", "e\u0301", "\ufb01", "12345", "  ", ""]
    return "".join(rng.choice(parts) if rng.random() < 0.5 else char() for _ in range(12))


def test_round_trip_is_exact(tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(1000)] + ["", " ", "\u2581", " x", "x ", "\n", "\0"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream_decode(iter(ids))) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch(texts, num_threads=2) == [tokenizer.encode(t) for t in texts]


def test_text_never_becomes_a_control_token(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, 0}
    for text in ("<s>", "</s>", "<unk>", "a<s>b</s>c", "<s></s>" * 9):
        assert not special & set(tokenizer.encode(text))
    ids = tokenizer.encode("<s>x", bos=True, eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("<s>x"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<s>x"


def test_digits_are_split_and_indentation_is_learned(tokenizer):
    assert len(tokenizer.encode("3141592653")) == 10
    assert len(tokenizer.encode(":\n    return ")) < 5
    assert any("\n" in tokenizer.decode([i]) and len(tokenizer.decode([i])) > 3
               for i in range(259, tokenizer.vocab_size))


def test_stream_holds_back_half_a_character(tokenizer):
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) == 6  # a, four bytes, b
    assert list(tokenizer.stream_decode(iter(ids))) == ["a", "\U0001f600", "b"]
    seen = []

    def spy():
        for i in ids:
            seen.append(i)
            yield i
    stream = tokenizer.stream_decode(spy())
    assert next(stream) == "a" and len(seen) == 1  # nothing is read ahead
    cut = ids[:3]
    assert "".join(tokenizer.stream_decode(cut)) == tokenizer.decode(cut) == "a\ufffd"


def test_wrong_arguments(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(TypeError, match="str, got bytes"):
        tokenizer.encode(b"ab")
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"\[0, 400\), got {bad}"):
            tokenizer.decode([5, bad])


def test_training_is_deterministic(model_path, tmp_path):
    Tokenizer.train(iter(TEXTS), tmp_path / "again.model", 400)
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()


def test_long_lines_and_dropped_characters_still_train(tmp_path):
    """One line of 400,000 characters, each chunk of which holds SentencePiece's U+2585."""
    line = "the quick brown fox \u2585 jumps over " * 12_000
    tokenizer = Tokenizer.train([line], tmp_path / "t.model", 330)
    assert len(tokenizer.encode("the quick brown fox ")) <= 3
    assert tokenizer.decode(tokenizer.encode(line[:500])) == line[:500]


def test_training_reads_a_bounded_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TRAIN_CHARS", 10_000)
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield CODE
    Tokenizer.train(endless(), tmp_path / "t.model", 300)
    assert len(taken) == -(-10_000 // len(CODE))


def test_training_errors_are_one_sentence(tmp_path):
    path = tmp_path / "t.model"
    with pytest.raises(LlamaExtError, match=r"expected at most \d+, .* got 4096"):
        Tokenizer.train(["abc abc"], path, 4096)
    with pytest.raises(LlamaExtError, match=r"expected at least 26\d .* got 100"):
        Tokenizer.train(["abc abc"], path, 100)
    with pytest.raises(LlamaExtError, match="the text is empty"):
        Tokenizer.train([], path, 400)
    with pytest.raises(LlamaExtError, match="nowhere/t.model: cannot write.*No such file"):
        Tokenizer.train(TEXTS, tmp_path / "nowhere" / "t.model", 400)
    assert os.listdir(tmp_path) == []


def test_missing_or_damaged_model(model_path, tmp_path):
    data = model_path.read_bytes()
    with pytest.raises(LlamaExtError, match="gone.model: cannot read.*No such file"):
        Tokenizer(tmp_path / "gone.model")
    with pytest.raises(LlamaExtError, match="cannot read.*directory"):
        Tokenizer(tmp_path)
    bad = tmp_path / "bad.model"
    rng = random.Random(0)
    cuts = sorted({0, 1, len(data) - 1, *(rng.randrange(len(data)) for _ in range(40))})
    for damaged in [data[:n] for n in cuts] + [b"garbage", rng.randbytes(5000)]:
        bad.write_bytes(damaged)
        with pytest.raises(LlamaExtError, match="bad.model: .*SentencePiece model"):
            Tokenizer(bad)


@pytest.mark.parametrize("options", [dict(normalization_rule_name="nmt_nfkc"),
                                     dict(add_dummy_prefix=True), dict(byte_fallback=False)])
def test_a_model_that_alters_text_is_refused(tmp_path, options):
    exact = dict(normalization_rule_name="identity", add_dummy_prefix=False, byte_fallback=True,
                 remove_extra_whitespaces=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:100]), model_prefix=str(tmp_path / "other"), vocab_size=310,
        model_type="bpe", minloglevel=2, **{**exact, **options})
    with pytest.raises(LlamaExtError, match="other.model: expected .* keeps text as it is"):
        Tokenizer(tmp_path / "other.model")
