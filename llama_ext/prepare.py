"""Documents to a folder of token shards: scan and clean, split, train a tokenizer, encode.

Every document is encoded as bos, its tokens, eos, so that a model learns where texts begin and end
and generation can stop at eos. (Meta's code also opens every text with bos; what LLaMA's training
put at the end is not published.)

Whole documents are held out for validation, chosen by a hash of seed and content, so the result
depends on the contents and options only, not on paths or the order of the inputs (which document
keeps a repeated line, with dedup="lines", does depend on it). Everything is written in
`out/.partial`, which at the end becomes the folder that a new meta.json names: a run that fails or
is killed leaves an earlier data set as it was.

The text of a document is read where it is, if that is a text file and stays as it is, else from
`out/.partial/text`, where the scan puts it. Memory holds about 170 bytes a document besides the
tokenizer's sample, a batch of text, and what documents.py and cleaning.py say.
"""

import codecs
import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .cleaning import Cleaner
from .data import FORMAT, load_meta, sha256, verify
from .documents import BLOCK, SUFFIXES, find, is_plain, read_documents
from .errors import LlamaExtError
from .files import fsync_folder, seal, write_atomically
from .tokenizer import TRAIN_CHARS, Tokenizer

_BATCH = 4 << 20  # bytes encoded at once


def prepare(inputs, out, *, vocab_size=4096, tokenizer=None, val_fraction=0.02,
            shard_tokens=100_000_000, suffixes=SUFFIXES, text_key="text", fix_text=False,
            invalid="skip", dedup="documents", min_chars=0, seed=0, progress=True):
    """Write the token shards of the text in `inputs` to the folder `out`; return its meta.json.

    inputs: files (taken whatever their suffix), folders (searched for files with one of `suffixes`,
        compressed or not; hidden entries, symbolic links to folders and `out` itself are left out)
        and the word "stdlib": the Python standard library's sources on this machine, without its
        tests and site-packages. A file is a document, but for .jsonl, .ndjson and .parquet, which
        have a document in each line or row, under the name `text_key`; .gz, .bz2, .xz and .zst
        are decompressed.
    fix_text, invalid, dedup, min_chars: how documents are cleaned, and which are skipped; see
        cleaning.Cleaner. By default what is not UTF-8, or holds a NUL byte, is empty or repeats
        another document is skipped, and the rest stays as it is.
    tokenizer: a SentencePiece .model to use; without it one with `vocab_size` pieces is trained on
        a random sample of the training text of at most TRAIN_CHARS bytes.
    val_fraction: share of the bytes to hold out, in whole documents; when these are too large for
        it, the end of the largest is held out instead.
    shard_tokens: tokens per shard; ids are uint16 up to a vocabulary of 65,536, else uint32.

    Writes tokenizer.model, train-00000.bin ..., val-00000.bin ... and val.txt (the held-out text,
    what the val tokens encode) into a folder in `out`, and `out/meta.json`: "folder", its name;
    dtype, vocab_size, bos_id, eos_id; "train" and "val" with documents, bytes (of text), tokens,
    shards; "skipped" and "cleaned", counts (see cleaning.Cleaner); "files" with bytes and sha256 of
    each; "fingerprint" of contents and options. When `out` already holds the same text, nothing is
    done. `progress` shows notes on stderr, and bars where it is a terminal. Raises LlamaExtError
    for bad input, unreadable files and a full disk.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if not 0 <= val_fraction < 1:
        raise ValueError(f"prepare: val_fraction must be in [0, 1), got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"prepare: shard_tokens must be at least 1, got {shard_tokens}")
    cleaner = Cleaner(fix_text, invalid, dedup, min_chars)
    out = Path(out)
    if tokenizer is not None:
        tokenizer, model = Tokenizer(tokenizer), Path(tokenizer)
        vocab_size = tokenizer.vocab_size
    try:
        paths = list(find(inputs, suffixes, out))
        out.mkdir(parents=True, exist_ok=True)
        with _partial_folder(out) as partial:
            documents, digests = _scan(paths, partial / "text", text_key, cleaner, seed, progress)
            if not len(documents):
                raise LlamaExtError(f"prepare: no text found in {', '.join(map(str, inputs))} "
                                    f"(skipped: {cleaner.skipped})")
            fingerprint = _fingerprint(digests, seed, vocab_size, tokenizer, val_fraction,
                                       shard_tokens)
            if meta := _complete(out, fingerprint):
                _note(progress, f"{out}: already prepared from the same text and options")
                return meta
            train, val = _split(documents, val_fraction)
            if tokenizer is None:
                _note(progress, f"training a tokenizer of {vocab_size} pieces")
                sample = _sample(train, TRAIN_CHARS, seed)
                tokenizer = Tokenizer.train(sample, partial / "tokenizer.model", vocab_size)
            else:
                shutil.copyfile(model, partial / "tokenizer.model")
            meta = {"format": FORMAT, "fingerprint": fingerprint, "folder": fingerprint[:12],
                    "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
                    "vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
                    "eos_id": tokenizer.eos_id, "skipped": cleaner.skipped,
                    "cleaned": cleaner.cleaned, "files": {}}
            with tqdm(desc="encoding", total=train.bytes + val.bytes, unit="B", unit_scale=True,
                      disable=None if progress else True) as bar:
                for split, spans in (("train", train), ("val", val)):
                    meta[split] = _encode(spans, tokenizer, partial, split, meta["dtype"],
                                          shard_tokens, bar)
            (partial / "text").unlink()
            _publish(partial, out, meta)
    except OSError as e:
        where = e.filename or out
        raise LlamaExtError(f"{where}: cannot prepare the data: {e.strerror or e}") from None
    return meta


@dataclass(frozen=True)
class _Span:
    """Bytes [start, stop) of a file, the text of a document or a part of it."""
    path: Path
    start: int
    stop: int


class _Documents:
    """A sequence of _Span in arrays, 20 bytes each."""

    def __init__(self, paths, file, start, stop):
        self.paths = paths
        self.file, self.start, self.stop = file, start, stop  # file: an index into paths

    @property
    def sizes(self):
        """Bytes of each."""
        return self.stop - self.start

    @property
    def bytes(self):
        return int(self.sizes.sum())

    def __len__(self):
        return len(self.file)

    def __getitem__(self, i):
        return _Span(self.paths[self.file[i]], int(self.start[i]), int(self.stop[i]))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def take(self, rows):
        """A copy of those that `rows`, an array of indices or bools, picks."""
        return _Documents(self.paths, self.file[rows], self.start[rows], self.stop[rows])


def _note(progress, text):
    if progress:
        print(text, file=sys.stderr, flush=True)


def _scan(paths, spool_path, text_key, cleaner, seed, progress):
    """Read and clean every document once; (_Documents, their sha256 digests, a row of uint8 each),
    in an order drawn from seed.

    Those that are no files of their own, or do not stay as they are, go to the file `spool_path`.
    """
    files, file, start, stop = [spool_path], array("i"), array("q"), array("q")
    digests = bytearray()
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None if progress else True) \
            as bar, open(spool_path, "wb") as spool:
        for path in paths:
            plain = is_plain(path) and not cleaner.rewrites
            for blocks in read_documents(path, text_key):
                begin = spool.tell()
                kept = cleaner.clean(_counted(blocks, bar), None if plain else spool.write)
                if kept is None:
                    spool.seek(begin)  # the next document takes its place
                    continue
                size, digest = kept
                if plain:
                    files.append(path)
                file.append(len(files) - 1 if plain else 0)
                start.append(0 if plain else begin)
                stop.append(start[-1] + size)
                digests += digest
    keys = bytearray()
    for i in range(0, len(digests), 32):
        keys += hashlib.sha256(b"%d " % seed + digests[i:i + 32]).digest()
    order = np.argsort(np.frombuffer(keys, "S32"), kind="stable")
    documents = _Documents(files, *map(np.array, (file, start, stop))).take(order)
    return documents, np.frombuffer(digests, np.uint8).reshape(-1, 32)[order]


def _counted(blocks, bar):
    for block in blocks:
        bar.update(len(block))
        yield block


def _fingerprint(digests, seed, vocab_size, tokenizer, val_fraction, shard_tokens):
    digest = hashlib.sha256(json.dumps(
        [FORMAT, seed, vocab_size, tokenizer and tokenizer.sha256, val_fraction,
         shard_tokens]).encode())
    digest.update(digests)
    return digest.hexdigest()


def _complete(out, fingerprint):
    """The meta of `out` when it is whole and of this fingerprint, else None."""
    try:
        meta = load_meta(out)
        if meta["fingerprint"] == fingerprint:
            verify(out)
            return meta
    except LlamaExtError:
        pass
    return None


@contextlib.contextmanager
def _partial_folder(out):
    """An empty folder out/.partial, gone afterwards; one run at a time may have it."""
    lock = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlamaExtError(f"{out}: another prepare is writing here") from None
        except OSError:
            pass  # a file system without locks
        partial = out / ".partial"
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run left
        partial.mkdir()
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _split(documents, val_fraction):
    """(train, val) spans: documents in turn go to val while they fit into its share of the bytes.

    When more than half of that share stays empty, the end of the largest document fills it.
    """
    room = budget = round(val_fraction * documents.bytes)
    held = np.zeros(len(documents), dtype=bool)
    for i, size in enumerate(documents.sizes.tolist()):
        held[i] = size <= room
        room -= size if held[i] else 0
    train, val = documents.take(~held), documents.take(held)
    if room > budget / 2:
        i = int(np.argmax(train.sizes))
        largest = train[i]
        cut = _line_start(largest, largest.stop - room)
        if largest.start < cut < largest.stop:
            val = documents.take(np.append(np.flatnonzero(held), np.flatnonzero(~held)[i]))
            train.stop[i] = val.start[-1] = cut
    return train, val


def _line_start(document, offset):
    """The first line start at or after `offset`; where none is near, the first character start."""
    with open(document.path, "rb") as f:
        f.seek(offset)
        block = f.read(min(BLOCK, document.stop - offset))
    newline = block.find(b"\n")
    if 0 <= newline < len(block) - 1:
        return offset + newline + 1
    return offset + next((i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), 0)


def _sample(spans, limit, seed):
    """Yield a random sample of the text, about `limit` bytes in blocks of 64 KiB."""
    rng, size = random.Random(seed), 1 << 16
    keep = limit / max(1, spans.bytes)
    for span, f in _opened(spans):
        for start in range(span.start, span.stop, size):
            if rng.random() < keep:
                f.seek(start)
                block = f.read(min(size, span.stop - start))
                yield block.decode(errors="ignore")  # drops characters cut at either end


def _opened(spans):
    """Yield (span, its file), where spans in a row are of one file opened once."""
    for path, group in itertools.groupby(spans, key=lambda span: span.path):
        with open(path, "rb") as f:
            for span in group:
                yield span, f


def _blocks(spans):
    """Yield (text, is its span's first, is its span's last) in blocks of at most BLOCK bytes."""
    for span, f in _opened(spans):
        decoder, at = codecs.getincrementaldecoder("utf-8")(), span.start
        f.seek(at)
        while at < span.stop:
            block = f.read(min(BLOCK, span.stop - at))
            first, at = at == span.start, at + len(block)
            try:
                text = decoder.decode(block, final=at == span.stop)
            except UnicodeDecodeError:
                text = ""
            if not text:
                raise LlamaExtError(f"{span.path}: changed while it was being read")
            yield text, first, at == span.stop


def _encode(spans, tokenizer, folder, split, dtype, shard_tokens, bar):
    """Write the shards of `spans` (and val.txt); return their entry of meta.json."""
    count = {"documents": len(spans), "bytes": spans.bytes, "tokens": 0}
    threads, batch, size = torch.get_num_threads(), [], 0
    with _ShardWriter(folder, split, dtype, shard_tokens) as shards, \
            open(folder / "val.txt" if split == "val" else os.devnull, "wb") as text_file:

        def flush():
            ids_of_texts = tokenizer.encode_batch([text for text, _, _ in batch], threads)
            for (text, first, last), ids in zip(batch, ids_of_texts):
                ids = [tokenizer.bos_id] * first + ids + [tokenizer.eos_id] * last
                shards.write(ids)
                count["tokens"] += len(ids)
                data = text.encode()
                text_file.write(data)
                bar.update(len(data))

        for block in _blocks(spans):
            batch.append(block)
            size += len(block[0])
            if size >= _BATCH:
                flush()
                batch, size = [], 0
        flush()
        text_file.flush()
    return {**count, "shards": shards.names}


class _ShardWriter:
    """Files <split>-00000.bin ... of at most `shard_tokens` ids, raw and little-endian."""

    def __init__(self, folder, split, dtype, shard_tokens):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.names, self._file, self._room = [], None, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()

    def write(self, ids):
        ids = np.array(ids, dtype=self.dtype)
        while ids.size:
            if not self._room:
                if self._file:
                    self._file.close()
                self.names.append(f"{self.split}-{len(self.names):05}.bin")
                self._file, self._room = open(self.folder / self.names[-1], "wb"), self.shard_tokens
            part, ids = ids[:self._room], ids[self._room:]
            self._file.write(part.tobytes())
            self._room -= part.size


def _publish(partial, out, meta):
    """Make the finished folder `partial` the data set of `out`: it is once meta.json names it."""
    for path in sorted(partial.iterdir()):
        with open(path, "rb") as f:
            os.fsync(f.fileno())
        meta["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    fsync_folder(partial)
    final = out / meta["folder"]
    shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run killed before meta.json
    os.rename(partial, final)
    write_atomically(out / "meta.json", seal(meta))
    for old in out.iterdir():
        if re.fullmatch("[0-9a-f]{12}", old.name) and old != final:
            shutil.rmtree(old)
