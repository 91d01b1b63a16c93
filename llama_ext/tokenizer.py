"""SentencePiece BPE that reproduces every text exactly: digits one by one, byte fallback.

The recipe of the LLaMA paper (arXiv 2302.13971, section 2.1). Two settings go beyond it, because
they suit source code: pieces may hold line ends and runs of spaces, and may span words
("):\\n        return"). On Python code held out from training that packs 30 % more bytes into a
token of a 4096-piece vocabulary (dev/LOG.md).
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


class Tokenizer:
    """Text to ids and back, exact for every str of valid Unicode: decode(encode(t)) == t.

    Text never becomes a control token: "<s>" in a text is three characters; bos and eos come only
    from the arguments of `encode`.

    path: a SentencePiece .model as `train` writes it. Raises LlamaExtError for one that is missing,
    corrupt, has no bos, eos or byte pieces, or alters text (a normaliser, a dummy prefix).
    Attributes: vocab_size, bos_id, eos_id (int); sha256 (hex digest of the file).
    """

    def __init__(self, path):
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise LlamaExtError(f"{path}: cannot read the tokenizer: {e.strerror}") from None
        sp = sentencepiece.SentencePieceProcessor()
        try:
            if not data:
                raise RuntimeError("empty file")
            sp.load_from_serialized_proto(data)
        except RuntimeError:
            raise LlamaExtError(f"{path}: not a SentencePiece model, or a damaged one") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size = sp.get_piece_size()
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        self._sp = sp
        self._bytes = [_piece_bytes(sp, i) for i in range(self.vocab_size)]
        self._space = [sp.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        if min(self.bos_id, self.eos_id) < 0 or self.decode(self.encode(_PROBE)) != _PROBE:
            raise LlamaExtError(
                f"{path}: expected a SentencePiece model with bos, eos and byte pieces that keeps "
                "text as it is (identity normalisation, add_dummy_prefix=false), got another kind")

    def encode(self, text, bos=False, eos=False):
        """The ids of `text` (list of int), with bos before and eos after it when asked for.

        Raises ValueError when `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts, num_threads=1):
        """[encode(t) for t in texts], on `num_threads` threads."""
        texts = list(texts)
        for text in texts:
            _check_text("encode", text)
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

    def decode(self, ids):
        """The text of `ids` (iterable of int); control ids give nothing, half a character U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        return b"".join(map(self._id_bytes, ids)).decode(errors="replace")

    def stream_decode(self, ids):
        """Yield the text of the iterator `ids` piece by piece, never half a character.

        A piece is yielded as soon as its last byte is known; the pieces joined are decode(ids).
        """
        decode = self.stream_decoder()
        for i in itertools.chain(ids, [None]):
            if text := decode(i):
                yield text

    def stream_decoder(self):
        """A function of one id after the other, and of None at the end: each time the text that is
        complete with it, which may be empty, and never ends in half a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda i: (decoder.decode(b"", final=True) if i is None
                          else decoder.decode(self._id_bytes(i)))

    def _id_bytes(self, i):
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"decode: ids must be in [0, {self.vocab_size}), got {i}")
        return self._bytes[i]

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


def _check_text(where, text):
    if not isinstance(text, str):
        raise TypeError(f"{where}: text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where}: text must be valid Unicode, got a lone surrogate "
                         f"{text[e.start]!r} at character {e.start}") from None


def _piece_bytes(sp, i):
    """The bytes that id `i` stands for: none for control pieces and <unk>."""
    if sp.is_control(i) or sp.is_unknown(i):
        return b""
    piece = sp.id_to_piece(i)
    return bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.replace(_SPACE, " ").encode()


def _sentences(texts):
    """Cut the first TRAIN_CHARS characters of `texts` into sentences that SentencePiece keeps."""
    left = TRAIN_CHARS
    for text in texts:
        _check_text("train", text)
        text = text[:left].replace(_DROPPED, " ")
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
