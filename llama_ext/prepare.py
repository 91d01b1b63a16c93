"""Text files to a folder of token shards: scan, split, train a tokenizer, encode.

Every document is encoded as bos, its tokens, eos, so that a model learns where texts begin and end
and generation can stop at eos. (Meta's code also opens every text with bos; what LLaMA's training
put at the end is not published.)

Whole documents are held out for validation, chosen by a hash of seed and content, so the result
depends on the contents and options only, not on paths or the order of the inputs. Everything is
written in `out/.partial`, which at the end becomes the folder that a new meta.json names: a run
that fails or is killed leaves an earlier data set as it was. Memory is bounded by the list of
files, the tokenizer's sample and one batch of text.
"""

import codecs
import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .data import FORMAT, load_meta, sha256, verify
from .errors import LlamaExtError
from .files import fsync_folder, seal, write_atomically
from .tokenizer import TRAIN_CHARS, Tokenizer

SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp",
            ".rs", ".go", ".java", ".js", ".ts", ".sh", ".tex", ".html", ".css")
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test")
_BLOCK = 1 << 20  # bytes read at once
_BATCH = 4 << 20  # bytes encoded at once


def prepare(inputs, out, *, vocab_size=4096, tokenizer=None, val_fraction=0.02,
            shard_tokens=100_000_000, suffixes=SUFFIXES, seed=0, progress=True):
    """Write the token shards of the text in `inputs` to the folder `out`; return its meta.json.

    inputs: files (taken whatever their suffix), folders (searched for files with one of `suffixes`;
        hidden entries, symbolic links to folders and `out` itself are left out) and the word
        "stdlib": the Python standard library's sources on this machine, without its tests and
        site-packages. Files that are not UTF-8 or hold a NUL byte, empty files and repeated
        contents are skipped and counted.
    tokenizer: a SentencePiece .model to use; without it one with `vocab_size` pieces is trained on
        a random sample of the training text of at most TRAIN_CHARS bytes.
    val_fraction: share of the bytes to hold out, in whole documents; when these are too large for
        it, the end of the largest is held out instead.
    shard_tokens: tokens per shard; ids are uint16 up to a vocabulary of 65,536, else uint32.

    Writes tokenizer.model, train-00000.bin ..., val-00000.bin ... and val.txt (the held-out text,
    what the val tokens encode) into a folder in `out`, and `out/meta.json`: "folder", its name;
    dtype, vocab_size, bos_id, eos_id; "train" and "val" with documents, bytes (of text), tokens,
    shards; "skipped" counts; "files" with bytes and sha256 of each; "fingerprint" of contents and
    options. When `out` already holds the same, nothing is done. `progress` shows notes on stderr,
    and bars where it is a terminal. Raises LlamaExtError for bad input, unreadable files and a full
    disk.
    """
    if isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if not 0 <= val_fraction < 1:
        raise ValueError(f"prepare: val_fraction must be in [0, 1), got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"prepare: shard_tokens must be at least 1, got {shard_tokens}")
    out = Path(out)
    if tokenizer is not None:
        tokenizer, model = Tokenizer(tokenizer), Path(tokenizer)
        vocab_size = tokenizer.vocab_size
    try:
        documents, skipped = _scan(_find(inputs, suffixes, out), seed, progress)
        if not documents:
            raise LlamaExtError(f"prepare: no text found in {', '.join(map(str, inputs))} "
                                f"(skipped: {skipped})")
        fingerprint = _fingerprint(documents, seed, vocab_size, tokenizer, val_fraction,
                                   shard_tokens)
        if meta := _complete(out, fingerprint):
            _note(progress, f"{out}: already prepared from the same text and options")
            return meta
        out.mkdir(parents=True, exist_ok=True)
        with _partial_folder(out) as partial:
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
                    "eos_id": tokenizer.eos_id, "skipped": skipped, "files": {}}
            total = sum(d.stop - d.start for d in train + val)
            with tqdm(desc="encoding", total=total, unit="B", unit_scale=True,
                      disable=None if progress else True) as bar:
                for split, spans in (("train", train), ("val", val)):
                    meta[split] = _encode(spans, tokenizer, partial, split, meta["dtype"],
                                          shard_tokens, bar)
            _publish(partial, out, meta)
    except OSError as e:
        where = e.filename or out
        raise LlamaExtError(f"{where}: cannot prepare the data: {e.strerror or e}") from None
    return meta


@dataclass(frozen=True)
class _Span:
    """Bytes [start, stop) of a text file; `digest` is that of the whole file."""
    path: Path
    start: int
    stop: int
    digest: bytes


def _note(progress, text):
    if progress:
        print(text, file=sys.stderr, flush=True)


def _find(inputs, suffixes, out):
    """Yield the files named by `inputs`."""
    for entry in inputs:
        if entry == "stdlib":
            folder = Path(sysconfig.get_paths()["stdlib"])
            yield from _walk(folder, (".py",), out, _STDLIB_SKIPPED)
        elif Path(entry).is_dir():
            if Path(entry).resolve() == out.resolve():
                raise LlamaExtError(f"{out}: expected an output folder that is not an input too")
            yield from _walk(Path(entry), tuple(suffixes), out, ())
        elif Path(entry).is_file():
            yield Path(entry)
        else:
            raise LlamaExtError(f"{entry}: expected a text file, a folder or the word stdlib, "
                                "got a path that is neither")


def _walk(folder, suffixes, out, skipped_names):
    def fail(error):
        raise error
    out = out.resolve()
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and name not in skipped_names
                            and Path(parent, name).resolve() != out)
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith(suffixes) and not name.startswith(".") and path.is_file():
                yield path


def _scan(paths, seed, progress):
    """Read every file once: the different texts in an order drawn from seed, and skipped counts."""
    documents, seen = [], set()
    skipped = {"not_text": 0, "empty": 0, "duplicate": 0}
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for path in paths:
            size, digest = _read_whole(path)
            bar.update(size)
            if digest is None:
                skipped["not_text"] += 1
            elif not size:
                skipped["empty"] += 1
            elif digest in seen:
                skipped["duplicate"] += 1
            else:
                seen.add(digest)
                documents.append(_Span(path, 0, size, digest))
    documents.sort(key=lambda d: hashlib.sha256(b"%d " % seed + d.digest).digest())
    return documents, skipped


def _read_whole(path):
    """(size in bytes, sha256) of a text file; the digest is None for one that is not UTF-8 text."""
    digest, decoder, size = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    with open(path, "rb") as f:
        while block := f.read(_BLOCK):
            size += len(block)
            digest.update(block)
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return size, None
            if b"\0" in block:
                return size, None
    # A character cut off by the end of the file is left in the decoder.
    return size, None if decoder.getstate()[0] else digest.digest()


def _fingerprint(documents, seed, vocab_size, tokenizer, val_fraction, shard_tokens):
    digest = hashlib.sha256(json.dumps(
        [FORMAT, seed, vocab_size, tokenizer and tokenizer.sha256, val_fraction,
         shard_tokens]).encode())
    for document in documents:
        digest.update(document.digest)
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
    room = budget = round(val_fraction * sum(d.stop for d in documents))
    train, val = [], []
    for document in documents:
        fits = document.stop <= room
        (val if fits else train).append(document)
        room -= document.stop if fits else 0
    if room > budget / 2:
        largest = max(train, key=lambda d: d.stop)
        cut = _line_start(largest, largest.stop - room)
        if 0 < cut < largest.stop:
            train[train.index(largest)] = _Span(largest.path, 0, cut, largest.digest)
            val.append(_Span(largest.path, cut, largest.stop, largest.digest))
    return train, val


def _line_start(document, offset):
    """The first line start at or after `offset`; where none is near, the first character start."""
    with open(document.path, "rb") as f:
        f.seek(offset)
        block = f.read(_BLOCK)
    newline = block.find(b"\n")
    if 0 <= newline < len(block) - 1:
        return offset + newline + 1
    return offset + next((i for i, byte in enumerate(block) if byte & 0xC0 != 0x80), 0)


def _sample(spans, limit, seed):
    """Yield a random sample of the text, about `limit` bytes in blocks of 64 KiB."""
    rng, size = random.Random(seed), 1 << 16
    keep = limit / max(1, sum(s.stop - s.start for s in spans))
    for span in spans:
        with open(span.path, "rb") as f:
            for start in range(span.start, span.stop, size):
                if rng.random() < keep:
                    f.seek(start)
                    block = f.read(min(size, span.stop - start))
                    yield block.decode(errors="ignore")  # drops characters cut at either end


def _blocks(spans):
    """Yield (text, is its span's first, is its span's last) in blocks of at most _BLOCK bytes."""
    for span in spans:
        decoder, at = codecs.getincrementaldecoder("utf-8")(), span.start
        with open(span.path, "rb") as f:
            f.seek(at)
            while at < span.stop:
                block = f.read(min(_BLOCK, span.stop - at))
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
    count = {"documents": len(spans), "bytes": sum(s.stop - s.start for s in spans), "tokens": 0}
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
