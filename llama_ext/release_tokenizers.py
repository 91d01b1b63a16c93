"""The tokenizers of the Llama releases, and which one a folder holds.

    tokenizer.json     Hugging Face's, through the tokenizers library: Llama 3 and others
    tokenizer.model    Meta's of Llama 3: the base64 of a token's bytes and its rank, a line each
    tokenizer.model    SentencePiece: Llama 1 and 2, and ours (tokenizer.py)

Where there are both files tokenizer.json counts: it has the tokens that fine-tuning added.
"""

import base64
import binascii
import json
import re
from pathlib import Path

from .errors import LlamaExtError
from .files import read_json
from .tokenizer import (BaseTokenizer, Tokenizer, check_text, control_pieces, parse_model,
                        piece_bytes, read_model, sentencepiece_hf_files)

# Files that belong to a tokenizer, and travel with it. The last is generation's ids of bos and eos.
FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "generation_config.json")

# Of Llama 3's tokenizer (github.com/meta-llama/llama3, llama/tokenizer.py), names as in 3.1.
_LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
_LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(3, 248)]  # 256 in all
_LLAMA3_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+=*) (\d+)\r?")

# Appended to a serialized ModelProto: normalizer_spec { add_dummy_prefix: false }. Of a field that
# comes twice protobuf takes the last.
_NO_PREFIX = b"\x1a\x02\x18\x00"


def load_tokenizer(folder):
    """The BaseTokenizer that the files in `folder` describe.

    bos and eos come from tokenizer_config.json, special_tokens_map.json, generation_config.json
    and, if they say nothing, config.json; eos_ids are all that any of the first three names.
    Raises LlamaExtError when there is none, it is damaged, of another kind, or has no eos.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder)
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise LlamaExtError(f"{folder}: expected tokenizer.model or tokenizer.json, found neither")
    if _RANK_LINE.fullmatch(read_model(file).partition(b"\n")[0]):
        return RankTokenizer(folder)
    try:
        return Tokenizer(file)
    except LlamaExtError:  # damaged, which the next says too, or not ours
        return SentencePieceTokenizer(folder)


def check_fits(folder, tokenizer, vocab_size):
    """Raises LlamaExtError when the tokenizer from `folder` has ids that a model with `vocab_size`
    embeddings lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise LlamaExtError(f"{folder}: tokenizer: expected at most vocab_size = {vocab_size} "
                            f"pieces, got {tokenizer.vocab_size}")


class SentencePieceTokenizer(BaseTokenizer):
    """That of Llama 1 and 2: what SentencePiece makes of FOLDER/tokenizer.model, with a space
    before a text where the model says so.

    As for SentencePiece, "\\u2581" in a text is a space. Raises LlamaExtError for a model that is
    missing, damaged or has no eos.
    """

    def __init__(self, folder):
        file = folder / "tokenizer.model"
        data = read_model(file)
        self._sp = parse_model(file, data)
        self._sp_after = parse_model(file, data + _NO_PREFIX)
        self._prefix = self._sp.encode("a", out_type=str)[0].startswith("\u2581")
        special, pieces = _Special(folder), piece_bytes(self._sp)
        self._begins_with_bos = special.add_bos is not False and self._sp.bos_id() >= 0
        self._has(pieces, control_pieces(self._sp),
                  *special.ids(file, len(pieces), [self._sp.bos_id()], [self._sp.eos_id()]))

    def encode_batch(self, texts, num_threads=1):
        texts = [check_text("encode", text) for text in texts]
        return self._sp.encode(texts, num_threads=num_threads)

    def encode_continuation(self, text):
        return self._sp_after.encode(check_text("encode", text))

    def hf_files(self):
        """{name: JSON object} of what transformers needs beside tokenizer.model."""
        return sentencepiece_hf_files(self._sp, self._prefix)


class JsonTokenizer(BaseTokenizer):
    """A tokenizer.json as the tokenizers library reads it. Texts get the ids that library gives
    them; text never becomes a special token.

    Raises LlamaExtError for one that is missing, damaged, has no eos, or turns ids into text in
    another way than byte-level BPE or SentencePiece's byte fallback.
    """

    def __init__(self, folder):
        file = folder / "tokenizer.json"
        spec = read_json(file)
        pieces, names = self._read(file, spec)
        special = _Special(folder)
        own = [[token and self._main.token_to_id(token)]
               for token in (special.bos_token, special.eos_token)]
        self._has(pieces, names, *special.ids(file, len(pieces), *own))
        self._begins_with_bos = (self._main.encode("").ids[:1] == [self.bos_id]
                                 if special.add_bos is None else special.add_bos)

    def _read(self, file, spec):
        """Sets what encodes; returns the bytes of each id, and the special tokens' ids by text."""
        self._main = self._after = _from_spec(file, spec)
        other = {part: _without_prefix(spec.get(part)) for part in ("normalizer", "pre_tokenizer")}
        if any(spec.get(part) != without for part, without in other.items()):
            self._after = _from_spec(file, {**spec, **other})
        to_bytes, self._prefix = _decoder(file, spec.get("decoder"))
        vocabulary = self._main.get_vocab(with_added_tokens=True)
        special = {token.content: i for i, token in self._main.get_added_tokens_decoder().items()
                   if token.special}
        pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, i in vocabulary.items():
            pieces[i] = b"" if token in special else to_bytes(token)
        return pieces, special

    def encode_batch(self, texts, num_threads=1):
        return [self._main.encode(check_text("encode", text), add_special_tokens=False).ids
                for text in texts]

    def encode_continuation(self, text):
        return self._after.encode(check_text("encode", text), add_special_tokens=False).ids

    def hf_files(self):
        """{name: JSON object} of what transformers needs beside tokenizer.json."""
        return {"tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "bos_token": self._main.id_to_token(self.bos_id),
            "eos_token": self._main.id_to_token(self.eos_id)}}


class RankTokenizer(JsonTokenizer):
    """Meta's of Llama 3, in tiktoken's format: FOLDER/tokenizer.model.

    The ranks are those of the merged tokens; split pattern and the 256 special tokens behind them
    are constants in Meta's code. Raises LlamaExtError for a file that is damaged.
    """

    def __init__(self, folder):
        file = folder / "tokenizer.model"
        self._spec = _spec_of_ranks(read_ranks(file))
        pieces, special = self._read(file, self._spec)
        self._has(pieces, special, *_Special(folder).ids(
            file, len(pieces), [special[_LLAMA3_SPECIAL[0]]], [*map(special.get, _LLAMA3_EOS)]))

    def hf_files(self):
        return {"tokenizer.json": self._spec, **super().hf_files()}


class _Special:
    """What the files beside a tokenizer say of bos and eos. bos_token, eos_token: their texts, or
    None; add_bos: whether texts begin with bos, or None."""

    def __init__(self, folder):
        self._generation, self._model = (read_json(folder / name, missing={})
                                         for name in ("generation_config.json", "config.json"))
        settings = {**read_json(folder / "special_tokens_map.json", missing={}),
                    **read_json(folder / "tokenizer_config.json", missing={})}
        self.add_bos = settings.get("add_bos_token")
        self.bos_token, self.eos_token = (_content(settings.get(name))
                                          for name in ("bos_token", "eos_token"))

    def ids(self, file, vocab_size, bos, eos):
        """(id of bos, ids of eos), checked. bos, eos: lists of the tokenizer's own; None and -1 in
        them are none. Where there is no bos, a text is what comes after eos."""
        found = []
        for own, name in ((bos, "bos_token_id"), (eos, "eos_token_id")):
            ids = [*own, *_listed(self._generation.get(name))]
            ids = [i for i in ids if i not in (None, -1)] or _listed(self._model.get(name))
            for i in ids:
                if not isinstance(i, int) or not 0 <= i < vocab_size:
                    raise LlamaExtError(f"{file}: {name}: expected ids below its {vocab_size}, "
                                        f"got {i!r} in a file beside it")
            found.append(ids)
        bos, eos = found
        if not eos:
            raise LlamaExtError(f"{file}: expected an eos token in it or in the files beside it "
                                "(tokenizer_config.json, generation_config.json), found none")
        return (bos or eos)[0], eos


def _content(token):
    """The text of a token in a settings file, which has itself or an object with it; or None."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _listed(ids):
    return [] if ids is None else list(ids) if isinstance(ids, list) else [ids]


# --- tokenizer.json ---

def _from_spec(file, spec):
    """The tokenizers.Tokenizer of a tokenizer.json's content."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing more precise
        raise LlamaExtError(f"{file}: not a tokenizer.json that the tokenizers library can read, "
                            f"or a damaged one ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text
    return tokenizer


def _without_prefix(part):
    """A normalizer or pre_tokenizer of a tokenizer.json, without the space that it puts before a
    text; None for none."""
    if not part or part["type"] == "Prepend":
        return None
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    part = {key: never.get(key, value) for key, value in part.items()}
    for key in {"normalizers", "pretokenizers"} & part.keys():
        part[key] = [one for one in map(_without_prefix, part[key]) if one]
    return part


def _decoder(file, spec):
    """(function from a token to its bytes, whether a space before the text is removed) of a
    tokenizer.json's decoder."""
    steps = (spec or {}).get("decoders", [spec])
    kinds = [step and step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    space, strip = {"String": "\u2581"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[3:] in ([], [strip]) and (
            steps[0]["pattern"] == space and steps[0]["content"] == " "):
        return _byte_fallback, bool(steps[3:])
    raise LlamaExtError(f"{file}: decoder: expected ByteLevel, or Replace of U+2581, ByteFallback, "
                        f"Fuse and at most a Strip, got {', '.join(map(str, kinds))}")


def _byte_characters():
    """How byte-level BPE writes each byte: visible characters of Latin-1 as they are, the others as
    U+0100 and on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in visible else next(others)) for b in range(0x100)]


_CHARACTERS = _byte_characters()
_BYTES = {character: b for b, character in enumerate(_CHARACTERS)}


def _byte_level(token):
    return bytes(map(_BYTES.get, token)) if _BYTES.keys() >= set(token) else token.encode()


def _byte_fallback(token):
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1])
    return token.replace("\u2581", " ").encode()


# --- Meta's of Llama 3 ---

def read_ranks(file):
    """{bytes of a token: rank} of a file in tiktoken's format.

    Raises LlamaExtError unless every line is a token and a rank, the ranks are 0 and on without a
    gap, and every byte has a token.
    """
    ranks = {}
    for number, line in enumerate(read_model(file).rstrip(b"\n").split(b"\n"), 1):
        match = _RANK_LINE.fullmatch(line)
        try:
            ranks[base64.b64decode(match[1], validate=True)] = int(match[2])
        except (TypeError, binascii.Error):
            raise LlamaExtError(f"{file}: line {number}: expected a token in base64, a space and "
                                f"its rank, got {line[:40]!r}") from None
    if sorted(ranks.values()) != list(range(number)):
        raise LlamaExtError(f"{file}: expected {number} tokens with the ranks 0 to {number - 1}, "
                            "each once")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise LlamaExtError(f"{file}: expected a token for every byte, found none for "
                            f"{missing[0]:#04x}")
    return ranks


def _spec_of_ranks(ranks):
    """The content of a tokenizer.json that does what tiktoken does with `ranks`.

    tiktoken merges the neighbours whose union has the least rank. That is BPE where a token's
    rank orders all of the ways to make it out of two.
    """
    vocabulary = {token.decode("latin-1").translate(_CHARACTERS): ranks[token]
                  for token in sorted(ranks, key=ranks.get)}
    merges = [(token[:n], token[n:]) for token in vocabulary for n in range(1, len(token))
              if token[:n] in vocabulary and token[n:] in vocabulary]
    bos = _LLAMA3_SPECIAL[0]
    added = [{"id": len(ranks) + i, "content": token, "special": True, "normalized": False,
              "single_word": False, "lstrip": False, "rstrip": False}
             for i, token in enumerate(_LLAMA3_SPECIAL)]
    first, second = ([{"SpecialToken": {"id": bos, "type_id": i}},
                      {"Sequence": {"id": name, "type_id": i}}] for i, name in enumerate("AB"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated",
             "invert": False}, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing", "single": first, "pair": first + second,
            "special_tokens": {bos: {"id": bos, "ids": [len(ranks)], "tokens": [bos]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": merges}}
