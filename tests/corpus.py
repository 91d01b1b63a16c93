"""A small corpus, data sets made by hand, damaged files and full disks, for the tests of what
comes after the kernels."""

import contextlib
import random
import resource

import numpy as np

from llama_ext.data import FORMAT, sha256
from llama_ext.files import seal
from llama_ext.tokenizer import Tokenizer

WORDS = "the a def return self x y café if else for in range print value 123 naïve\n".split(" ")


def write_texts(folder, count=40, seed=0):
    """`count` different texts of about 1,500 characters in `folder`; returns their paths."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"text{i:03}.txt" for i in range(count)]
    for path in paths:
        words = [rng.choice(WORDS) for _ in range(300)]
        path.write_text(" ".join(words) + f" {rng.random()}\n")
    return paths


def write_tokenizer(folder):
    """A tokenizer of 310 pieces, trained on such texts; returns the path of its file."""
    texts = [path.read_text() for path in write_texts(folder / "texts", 5)]
    Tokenizer.train(texts, folder / "tokenizer.model", 310)
    return folder / "tokenizer.model"


def write_data_set(folder, train, val=(), shard_tokens=100, vocab_size=1 << 16, dtype="uint16",
                   tokenizer="a"):
    """A data set with these token ids, as `prepare` lays it out; returns its folder."""
    meta = {"format": FORMAT, "folder": "f", "fingerprint": folder.name, "dtype": dtype,
            "vocab_size": vocab_size, "files": {"tokenizer.model": {"bytes": 1, "sha256": "0"}}}
    (folder / "f").mkdir(parents=True)
    (folder / "f" / "tokenizer.model").write_text(tokenizer)
    meta["files"]["tokenizer.model"]["sha256"] = sha256(folder / "f" / "tokenizer.model")
    for split, ids in (("train", train), ("val", val)):
        starts = range(0, len(ids), shard_tokens)
        meta[split] = {"shards": [f"{split}-{i}.bin" for i in range(len(starts))],
                       "bytes": 3 * len(ids), "tokens": len(ids)}
        for name, start in zip(meta[split]["shards"], starts):
            path = folder / "f" / name
            path.write_bytes(np.array(ids[start:start + shard_tokens], dtype).tobytes())
            meta["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "meta.json").write_bytes(seal(meta))
    return folder


def flip_bit(path):
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path):
    """Cut a file off in the middle."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@contextlib.contextmanager
def full_disk(room):
    """No file can grow beyond `room` bytes: writes fail as on a full disk (Python ignores the
    signal that comes with it)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
