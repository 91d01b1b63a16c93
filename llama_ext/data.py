"""Batches from the token shards that `prepare` writes: memory-mapped, shuffled, resumable.

The shards of a split, in order, are one array of N tokens. Window i holds the T = seq_len inputs at
[i T, i T + T) and the targets one further on; so every token but the first is a target once, and
windows may cross the boundaries of documents (marked by bos and eos) and of shards.
Dimensions: B batch size, T seq_len.
"""

import functools
import hashlib
import random
from pathlib import Path

import numpy as np
import torch

from .errors import LlamaExtError
from .files import unseal

FORMAT = "llama_ext tokens 2"
_DTYPES = {"uint16": "<u2", "uint32": "<u4"}  # on disk; always little-endian


def load_meta(folder):
    """The dict of meta.json in a folder that `prepare` completed; see its docstring for the keys.

    Raises LlamaExtError when it is missing or is none of ours.
    """
    path = Path(folder) / "meta.json"
    try:
        meta = unseal(path.read_bytes())
        if meta["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT!r}, got {meta['format']!r}")
    except FileNotFoundError:
        raise LlamaExtError(f"{folder}: no meta.json here, so no complete data set: expected a "
                            "folder written by `llama-ext prepare`") from None
    except OSError as e:
        raise LlamaExtError(f"{path}: cannot read: {e.strerror}") from None
    except ValueError as e:
        raise LlamaExtError(f"{path}: not the description of a data set, or damaged: {e}") from None
    return meta


def verify(folder):
    """Read every file of a prepared folder and compare it with the checksum in meta.json.

    Raises LlamaExtError naming the first file that is missing, truncated or changed. (Opening a
    TokenLoader checks sizes only, which costs nothing; this reads everything once.)
    """
    meta = load_meta(folder)
    for name, expected in meta["files"].items():
        path = Path(folder, meta["folder"], name)
        _check_size(path, expected["bytes"])
        got = sha256(path)
        if got != expected["sha256"]:
            raise LlamaExtError(f"{path}: damaged: expected sha256 {expected['sha256'][:12]}..., "
                                f"got {got[:12]}...; prepare the data again")


def sha256(path):
    """The hex SHA-256 of a file. Raises LlamaExtError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise LlamaExtError(f"{path}: cannot read: {e.strerror}") from None
    return digest.hexdigest()


def _check_size(path, expected):
    try:
        got = path.stat().st_size
    except OSError as e:
        raise LlamaExtError(f"{path}: cannot open: {e.strerror}") from None
    if got != expected:
        raise LlamaExtError(f"{path}: truncated or changed: expected {expected} bytes, got {got}")


class Loader:
    """What every loader of batches does: options, ranks, the endless iterator, saved positions.

    A subclass has `_row(i)`, the T + 1 ids of the i-th window of the endless order;
    `fingerprint`, what this order depends on besides the options; `num_tokens` and `counts`.
    """

    def __init__(self, name, split, batch_size, seq_len, seed, rank, world_size, shuffle):
        for option, value in (("batch_size", batch_size), ("seq_len", seq_len),
                              ("world_size", world_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {option} must be at least 1, "
                                 f"got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"{type(self).__name__}: rank must be in [0, {world_size}), "
                             f"got {rank}")
        if split not in ("train", "val"):
            raise ValueError(f"{type(self).__name__}: split must be 'train' or 'val', "
                             f"got {split!r}")
        self.name, self.split = name, split
        self.batch_size, self.seq_len, self.seed, self.shuffle = batch_size, seq_len, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self._position = 0  # windows taken by all ranks together since the beginning

    def __iter__(self):
        return self

    def __next__(self):
        first = self._position + self.rank * self.batch_size
        rows = [self._row(i) for i in range(first, first + self.batch_size)]
        self._position += self.world_size * self.batch_size
        batch = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def state_dict(self):
        """Where `next` stands, a JSON-able dict; the same on every rank.

        Another loader on the same data goes on exactly from there, with any batch size and number
        of ranks (the order of windows stays the same).
        """
        return {"position": self._position, **self._identity()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`. Raises LlamaExtError when it is from other data or options."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise LlamaExtError(f"{self.name}: cannot resume: the saved position is for "
                                    f"{key}={state.get(key)!r}, this loader has {value!r}")
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise LlamaExtError(f"{self.name}: cannot resume: expected a position of 0 or more, "
                                f"got {position!r}")
        self._position = position

    def check_tokens(self, least):
        """Raise LlamaExtError when the split has fewer than `least` tokens."""
        if self.num_tokens < least:
            raise LlamaExtError(f"{self.name}: the {self.split} split must have at least {least} "
                                f"tokens, got {self.num_tokens}")

    def progress(self):
        """One line of `counts`: "C4 1,234 tokens (0.01 epochs), Books ..."."""
        return ", ".join(f"{name} {count['tokens']:,} tokens ({count['epochs']:.2f} epochs)"
                         for name, count in self.counts().items())

    def _identity(self):
        return {"data": self.fingerprint, "split": self.split, "seq_len": self.seq_len,
                "seed": self.seed, "shuffle": self.shuffle}


class TokenLoader(Loader):
    """Endless iterator over batches (tokens, targets), each (B, T) int64, targets one token ahead.

    The windows of each epoch come in a new order that depends on `seed` and the epoch only (in
    file order with shuffle=False). Batches continue across the end of an epoch, so that none is
    short and no window is left out. With `world_size` ranks, each global batch of world_size * B
    windows is divided among them: the ranks are disjoint and together cover everything.

    folder: written by `prepare`; split: "train" or "val". Memory does not grow with the data.
    Raises LlamaExtError for a folder, shard or token id that is wrong, naming the file, and when
    the split is too short for one window.
    Attributes: fingerprint (of the data), vocab_size, tokenizer_path, text_paths (files with the
    held-out text, which the val split encodes), num_bytes (of the split's text), num_tokens,
    num_targets (of one pass of `batches`), num_windows (per epoch), epoch; meta (dict of
    meta.json), files (the folder of the shards).
    """

    def __init__(self, folder, split="train", batch_size=8, seq_len=256, seed=0, rank=0,
                 world_size=1, shuffle=True):
        super().__init__(folder, split, batch_size, seq_len, seed, rank, world_size, shuffle)
        self.folder = Path(folder)
        self.meta = load_meta(folder)
        self.fingerprint, self.vocab_size = self.meta["fingerprint"], self.meta["vocab_size"]
        self.files = self.folder / self.meta["folder"]
        self.tokenizer_path = self.files / "tokenizer.model"
        self.text_paths = [self.files / "val.txt"]
        self.num_bytes = self.meta[split]["bytes"]
        self._paths = [self.files / name for name in self.meta[split]["shards"]]
        for path in self._paths:
            _check_size(path, self.meta["files"][path.name]["bytes"])
        dtype = np.dtype(_DTYPES[self.meta["dtype"]])
        self._shards = [np.memmap(path, dtype, mode="r") for path in self._paths]
        self._starts = np.cumsum([0, *(shard.size for shard in self._shards)])
        self.num_tokens = int(self._starts[-1])
        self.num_targets = max(0, self.num_tokens - 1)
        self.num_windows = self.num_targets // seq_len

    @property
    def epoch(self):
        """The epoch (from 0) that the next global batch begins in."""
        return self._position // max(1, self.num_windows)

    def verify(self):
        """Compare every file of the data set with its checksum, as the function `verify` does."""
        verify(self.folder)

    def counts(self):
        """{folder: {"windows", "tokens", "epochs"}}: what all ranks together have taken so far."""
        return {str(self.folder): self._count(self._position)}

    def batches(self):
        """Yield (tokens, targets) for one pass in file order, wherever `next` stands.

        The last window and the last batch may be short: missing targets are -100 (missing tokens
        0), missing rows are left out. Every token but the first is a target exactly once over all
        ranks; all ranks yield equally many batches, so a rank's last may have targets -100 only.
        """
        self.check_tokens(2)
        windows = -(-self.num_targets // self.seq_len)
        step = self.world_size * self.batch_size
        for first in range(self.rank * self.batch_size, -(-windows // step) * step, step):
            rows = max(1, min(self.batch_size, windows - first))
            ids = self._read(first * self.seq_len, rows * self.seq_len + 1)
            tokens = np.zeros(rows * self.seq_len, dtype=np.int64)
            targets = np.full(rows * self.seq_len, -100, dtype=np.int64)
            count = max(0, ids.size - 1)
            tokens[:count], targets[:count] = ids[:-1], ids[1:]
            yield (torch.from_numpy(tokens).view(rows, self.seq_len),
                   torch.from_numpy(targets).view(rows, self.seq_len))

    def _count(self, windows):
        return {"windows": windows, "tokens": windows * self.seq_len,
                "epochs": windows / max(1, self.num_windows)}

    def _row(self, i):
        self.check_tokens(self.seq_len + 1)
        epoch, i = divmod(i, self.num_windows)
        if self.shuffle:
            i = _shuffled(i, self.num_windows, (self.seed, epoch))
        return self._read(i * self.seq_len, self.seq_len + 1)

    def _read(self, start, count):
        """Tokens [start, start + count) as int64, fewer where the data ends."""
        stop = min(start + count, self.num_tokens)
        out = np.empty(max(0, stop - start), dtype=np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < out.size:
            at = start + done - int(self._starts[shard])
            part = self._shards[shard][at:at + out.size - done]
            if part.max() >= self.vocab_size:
                raise LlamaExtError(f"{self._paths[shard]}: damaged: expected token ids below the "
                                    f"vocabulary size {self.vocab_size}, got {part.max()}")
            out[done:done + part.size] = part
            done += part.size
            shard += 1
        return out


def _shuffled(i, n, key):
    """Entry i of a random permutation of range(n), without storing the permutation.

    A balanced Feistel network on the next power of four, walked until it lands below n (Black and
    Rogaway 2002, "Ciphers with arbitrary finite domains", section 4).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    round_keys = _round_keys(key)
    while True:
        left, right = i >> half, i & mask
        for k in round_keys:
            left, right = right, left ^ (_mix(right ^ k) & mask)
        i = left << half | right
        if i < n:
            return i


@functools.lru_cache(maxsize=64)
def _round_keys(key):
    """Six 64-bit keys from `key`; seeding by a str is the same in every Python version."""
    rng = random.Random(str(key))
    return [rng.getrandbits(64) for _ in range(6)]


def _mix(x):
    """Spread 64 bits (the finaliser of SplitMix64; Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
