"""Cleaner and HashSet: what is kept, what is repaired, what is left out and counted."""

import random

import pytest

from llama_ext import cleaning
from llama_ext.cleaning import Cleaner, HashSet


def clean(cleaner, documents, block=7):
    """The texts that are kept of `documents` (str or bytes), each given in blocks of bytes."""
    kept = []
    for document in documents:
        data, out = document if isinstance(document, bytes) else document.encode(), bytearray()
        result = cleaner.clean([data[i:i + block] for i in range(0, len(data), block)], out.extend)
        if result:
            assert result[0] == len(out)
            assert result[1] == cleaning.hashlib.sha256(out).digest()
            kept.append(out.decode())
    return kept


def skipped(**counts):
    return {"not_text": 0, "empty": 0, "duplicate": 0, "short": 0, **counts}


def cleaned(repaired=0, lines=0, size=0):
    return {"repaired_documents": repaired, "removed_lines": lines, "removed_bytes": size}


def test_hash_set_is_a_set():
    rng, ours, reference = random.Random(0), HashSet(), set()
    values = [0, 1, (1 << 64) - 1, 1024, 2048] + [rng.getrandbits(64) for _ in range(5000)]
    for value in values + [rng.choice(values) for _ in range(2000)]:
        assert (value in ours) == (value in reference or value == 1 and 0 in reference)
        ours.add(value)
        reference.add(value)
    assert all(value in ours for value in values)
    assert not any(rng.getrandbits(64) in ours for _ in range(2000))
    assert ours._table.itemsize * len(ours._table) < 22 * len(values)


def test_by_default_text_stays_and_the_rest_is_skipped():
    cleaner = Cleaner()
    texts = ["a naïve\r\n \ufeff\U0001f600", "x", "a naïve\r\n \ufeff\U0001f600", "", "x\n"]
    assert clean(cleaner, [*texts, b"caf\xe9", b"a\0b", "caf\u00e9".encode()[:-1]], 3) == [
        texts[0], "x", "x\n"]
    assert cleaner.skipped == skipped(not_text=3, empty=1, duplicate=1)
    assert cleaner.cleaned == cleaned() and not cleaner.rewrites


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_invalid_bytes_are_replaced(block):
    cleaner = Cleaner(invalid="replace")
    assert cleaner.rewrites
    assert clean(cleaner, [b"caf\xe9 \xe2\x82", "\ufffd é", b"a\0b"], block) == [
        "caf\ufffd \ufffd\ufffd", "\ufffd é"]
    assert (cleaner.skipped, cleaner.cleaned) == (skipped(not_text=1), cleaned(1))


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_text_is_fixed(block):
    cleaner = Cleaner(fix_text=True)
    assert clean(cleaner, ["âœ” â€œfineâ€\x9d &amp; good\r\n<b>&lt;</b>\n", "as it is\n", "\x01",
                           b"caf\xe9"], block) == ['✔ "fine" & good\n<b>&lt;</b>\n', "as it is\n"]
    assert (cleaner.skipped, cleaner.cleaned) == (skipped(empty=1, not_text=1), cleaned(1))


def test_fixed_texts_are_compared_as_they_became():
    cleaner = Cleaner(fix_text=True, invalid="replace")
    assert clean(cleaner, ["“a”\r\n", '"a"\n', b"\xe9", "\ufffd"]) == ['"a"\n', "\ufffd"]
    assert (cleaner.skipped, cleaner.cleaned) == (skipped(duplicate=2), cleaned(2))


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_repeated_lines_are_left_out(block):
    documents = ["menu\n\none\n  menu \nmenu\n\n", "two\nmenu\ntwo", "menu\n\none", "\n\n", "two\n",
                 "é\nÉ\ntwo\n"]
    cleaner = Cleaner(dedup="lines")
    assert clean(cleaner, documents, block) == ["menu\n\none\n\n", "two\n", "\n\n", "é\nÉ\n"]
    assert cleaner.skipped == skipped(duplicate=2)
    size = len("  menu \nmenu\n" "menu\ntwo" "two\n")
    assert cleaner.cleaned == cleaned(lines=5, size=size)


@pytest.mark.parametrize("block", [3, 1000])
def test_lines_of_a_skipped_document_do_not_count(block):
    cleaner = Cleaner(dedup="lines", min_chars=8)
    documents = ["short\n", "nul\n\0", b"bad\n\xff", "short\nnul\nbad\n"]
    assert clean(cleaner, documents, block) == ["short\nnul\nbad\n"]
    assert (cleaner.skipped, cleaner.cleaned) == (skipped(short=1, not_text=2), cleaned())


def test_documents_that_become_too_short():
    cleaner = Cleaner(dedup="lines", min_chars=5)
    assert clean(cleaner, ["a line\n", "a line\nnew\n", "a line\nnewer\n"]) == ["a line\n",
                                                                              "newer\n"]
    assert cleaner.skipped == skipped(short=1)
    assert cleaner.cleaned == cleaned(lines=1, size=7)


def test_length_is_in_characters():
    cleaner = Cleaner(min_chars=4)
    assert clean(cleaner, ["ééé", "éééé", "abc", "abcd"]) == ["éééé", "abcd"]
    assert cleaner.skipped == skipped(short=2)


def test_none_keeps_everything_that_is_text():
    cleaner = Cleaner(dedup="none")
    assert clean(cleaner, ["a", "a", "", "a"]) == ["a", "a", "a"]
    assert cleaner.skipped == skipped(empty=1)


@pytest.mark.parametrize("block", [1, 3, 7, 8, 1000])
def test_long_lines_do_not_depend_on_the_blocks(block, monkeypatch):
    monkeypatch.setattr(cleaning, "_LONGEST", 8)
    text = "abcdefgh" + "ijkl\n" + "ABCDEFGH\n" + "abcdefghijkl\n" + "ABCDEFGHI"
    assert clean(Cleaner(dedup="lines"), [text], block) == ["abcdefghijkl\nABCDEFGH\nI"]
    assert clean(Cleaner(dedup="lines"), [text[:13]], block) == ["abcdefghijkl\n"]


@pytest.mark.parametrize("options, message", [
    ({"invalid": "drop"}, "invalid must be one of skip, replace, got 'drop'"),
    ({"dedup": "both"}, "dedup must be one of none, documents, lines, got 'both'"),
    ({"min_chars": -1}, "min_chars must be at least 0, got -1")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"prepare: {message}"):
        Cleaner(**options)
