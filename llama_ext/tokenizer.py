"""What a tokenizer is here, and ours: SentencePiece BPE that reproduces every text exactly.

Digits one by one, byte fallback: the recipe of the LLaMA paper (arXiv 2302.13971, section 2.1). Two
settings go beyond it, because they suit source code: pieces may hold line ends and runs of spaces,
and may span words ("):\\n        return"). On Python code held out from training that packs 30 %
more bytes into a token of a 4096-piece vocabulary (dev/LOG.md). The tokenizers of the Llama
releases are in release_tokenizers.py.
"""

import codecs
import hashlib
import io
import itertools
import re
from pathlib import Path

import sentencepiece

from .errors import LlamaExtError
from .files import write_atomically

TRAIN_CHARS = 16 << 20  # Tokenizer.train reads at most this many characters
_CHUNK = 4096           # characters per training sentence (SentencePiece drops longer ones)
_SPACE = "\u2581"       # SentencePiece writes a space as this character
_DROPPED = "\u2585"     # SentencePiece drops training sentences that hold this one
_PROBE = " a  \t\ufb01\r\n\n 12 \U0001f600 \0"  # a model that alters text alters this one


class BaseTokenizer:
    """Text to ids and back, as generation and evaluation need it. An id stands for bytes, and a
    text's UTF-8 is the bytes of its ids, but for the space that some put before a text.

    Text never becomes a special token by itself: "<s>" in a text is three characters; bos, eos and
    other control tokens come only from the arguments of `encode`.

    Attributes: vocab_size, bos_id, eos_id (int); eos_ids (tuple of int), any of which ends a text;
    special (dict), the ids of special tokens by their texts.
    """

    _begins_with_bos = True  # whether `encode` heeds bos for a text that is not empty
    _prefix = False          # whether encode_batch puts a space before a text, which decode removes

    def _has(self, pieces, special, bos_id, eos_ids):
        """Set the attributes. pieces: the bytes of each id, none for a special token's."""
        self._bytes, self.vocab_size, self.special = pieces, len(pieces), special
        self.bos_id, self.eos_id, self.eos_ids = bos_id, eos_ids[0], tuple(dict.fromkeys(eos_ids))

    def encode(self, text, bos=False, eos=False, special=False):
        """The ids of `text` (list of int), with bos before and eos after it when asked for.

        special: the texts of special tokens in it become these tokens, as in a chat's prompt; where
        it begins with bos, it gets no second one. Raises ValueError when `text` holds a lone
        surrogate, which UTF-8 cannot express.
        """
        ids = self._encode_special(text) if special else self.encode_batch([text])[0]
        if bos and not (special and ids[:1] == [self.bos_id]):
            ids = self.with_bos(ids)
        return ids + [self.eos_id] * eos

    def _encode_special(self, text):
        texts = sorted(self.special, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, texts))})", check_text("encode", text))
        ids = []
        for part in filter(None, parts):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.encode_continuation(part) if ids else self.encode(part)
        return ids

    def with_bos(self, ids):
        """The ids of a text behind bos, where this tokenizer's models begin their texts with it.
        An empty text always gets it: a model has to be given something."""
        return [self.bos_id, *ids] if self._begins_with_bos or not ids else ids

    def encode_batch(self, texts, num_threads=1):
        """[encode(t) for t in texts], on `num_threads` threads at most."""
        raise NotImplementedError

    def encode_continuation(self, text):
        """The ids of `text` as what follows another text: encode(text), but with no space before
        it. Errors as `encode`."""
        return self.encode(text)

    def decode(self, ids):
        """The text of `ids` (iterable of int); control ids give nothing, half a character U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        data = b"".join(map(self._id_bytes, ids))
        return (data.removeprefix(b" ") if self._prefix else data).decode(errors="replace")

    def stream_decode(self, ids):
        """Yield the text of the iterator `ids` piece by piece, never half a character.

        A piece is yielded as soon as its last byte is known; the pieces joined are decode(ids).
        """
        decode = self.stream_decoder()
        for i in itertools.chain(ids, [None]):
            if text := decode(i):
                yield text

    def stream_decoder(self, after=()):
        """A function of one id after the other, and of None at the end: each time the text that is
        complete with it, which may be empty, and never ends in half a character.

        after: ids that came before, whose text has been shown: decode(after), if it ends in no half
        character, and what the function returns are together decode(all ids).
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        prefix = self._prefix

        def step(i):
            nonlocal prefix
            data = b"" if i is None else self._id_bytes(i)
            if prefix and data:
                data, prefix = data.removeprefix(b" "), False
            return decoder.decode(data, final=i is None)

        for i in after:
            step(i)
        return step

    def _id_bytes(self, i):
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"decode: ids must be in [0, {self.vocab_size}), got {i}")
        return self._bytes[i]


class Tokenizer(BaseTokenizer):
    """Ours: exact for every str of valid Unicode, decode(encode(t)) == t.

    path: a SentencePiece .model as `train` writes it. Raises LlamaExtError for one that is missing,
    corrupt, has no bos, eos or byte pieces, or alters text (a normaliser, a dummy prefix).
    Attributes: those of BaseTokenizer; sha256 (hex digest of the file).
    """

    def __init__(self, path):
        data = read_model(path)
        sp = self._sp = parse_model(path, data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._has(piece_bytes(sp), control_pieces(sp), sp.bos_id(), [sp.eos_id()])
        self._space = [sp.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        if min(self.bos_id, self.eos_id) < 0 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise LlamaExtError(
                f"{path}: expected a SentencePiece model with bos, eos and byte pieces that keeps "
                "text as it is (identity normalisation, add_dummy_prefix=false), got another kind")

    def encode_batch(self, texts, num_threads=1):
        texts = [check_text("encode", text) for text in texts]
        # A literal U+2581 would come back as a space, so it goes in as its three bytes.
        segments = [segment for text in texts for segment in text.split(_SPACE)]
        encoded = iter(self._sp.encode(segments, num_threads=num_threads))
        out = []
        for text in texts:
            ids = next(encoded)
            for _ in range(text.count(_SPACE)):
                ids += self._space
                ids += next(encoded)
            out.append(ids)
        return out

    def hf_files(self):
        """{name: JSON object} of what transformers needs beside tokenizer.model."""
        return sentencepiece_hf_files(self._sp, prefix=False)

    @staticmethod
    def train(texts, path, vocab_size):
        """Learn `vocab_size` pieces from `texts`, write the model to `path`, return the Tokenizer.

        texts: iterable of str, read up to TRAIN_CHARS characters. Two threads; the same texts give
        the same file. Raises ValueError for a lone surrogate, LlamaExtError when the texts are
        empty or too short for `vocab_size`, and when `path` cannot be written.
        """
        sentences = list(_sentences(texts))  # outside the try: errors of `texts` are not ours
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size,
                model_type="bpe", split_digits=True, byte_fallback=True,
                normalization_rule_name="identity", add_dummy_prefix=False,
                remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
                split_by_whitespace=False, split_by_unicode_script=False,
                max_sentencepiece_length=32, max_sentence_length=4 * _CHUNK,
                num_threads=2, minloglevel=2)
        except RuntimeError as e:
            raise LlamaExtError(_why_training_failed(str(e), vocab_size)) from None
        try:
            write_atomically(path, model.getvalue())
        except OSError as e:
            raise LlamaExtError(f"{path}: cannot write the tokenizer: {e.strerror}") from None
        return Tokenizer(path)


def check_text(where, text):
    """`text`. Raises TypeError unless it is a str, ValueError unless that is valid Unicode."""
    if not isinstance(text, str):
        raise TypeError(f"{where}: text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: text must be valid Unicode, got a lone surrogate "
                         f"{text[e.start]!r} at character {e.start}") from None
    return text


def read_model(path):
    """The bytes of a tokenizer's file."""
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise LlamaExtError(f"{path}: cannot read the tokenizer: {e.strerror}") from None


def parse_model(path, data):
    """The SentencePieceProcessor of a .model's bytes; `path` is for the error."""
    sp = sentencepiece.SentencePieceProcessor()
    try:
        if not data:
            raise RuntimeError("empty file")
        sp.load_from_serialized_proto(data)
    except RuntimeError:
        raise LlamaExtError(f"{path}: not a SentencePiece model, or a damaged one") from None
    return sp


def piece_bytes(sp):
    """The bytes that each id of a SentencePieceProcessor stands for: none for control pieces and
    <unk>."""
    def of(i):
        if sp.is_control(i) or sp.is_unknown(i):
            return b""
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()
    return [of(i) for i in range(sp.get_piece_size())]


def control_pieces(sp):
    """{text: id} of a SentencePieceProcessor's control pieces."""
    return {sp.id_to_piece(i): i for i in range(sp.get_piece_size()) if sp.is_control(i)}


def sentencepiece_hf_files(sp, prefix):
    """The hf_files of a SentencePieceProcessor. prefix: whether it puts a space before a text."""
    tokens = {f"{name}_token": sp.id_to_piece(i) for name, i in
              (("unk", sp.unk_id()), ("bos", sp.bos_id()), ("eos", sp.eos_id()))}
    return {"tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True,
        "add_prefix_space": prefix, "clean_up_tokenization_spaces": False, **tokens}}


def _sentences(texts):
    """Cut the first TRAIN_CHARS characters of `texts` into sentences that SentencePiece keeps."""
    left = TRAIN_CHARS
    for text in texts:
        text = check_text("train", text)[:left].replace(_DROPPED, " ")
        for start in range(0, len(text), _CHUNK):
            yield text[start:start + _CHUNK]
        left -= len(text)
        if not left:
            return


def _why_training_failed(message, vocab_size):
    """One sentence from SentencePiece's error message."""
    if most := re.search(r"value <= (\d+)", message):
        return (f"vocab_size: expected at most {most[1]}, all that this little text gives, "
                f"got {vocab_size}")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (f"vocab_size: expected at least {least[1]} (256 bytes, 3 control pieces and the "
                f"text's characters), got {vocab_size}")
    if "sentences_.empty()" in message:
        return "cannot train a tokenizer: the text is empty"
    return f"cannot train a tokenizer with vocab_size {vocab_size}: {message}"
