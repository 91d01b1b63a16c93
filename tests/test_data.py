"""TokenLoader: what it yields, in which order, on any number of ranks, resumed, from bad files."""

import json
import os
import subprocess
import sys
import zlib

import pytest
import torch

from corpus import flip_bit, halve, write_data_set
from llama_ext.data import TokenLoader, load_meta, verify
from llama_ext.errors import LlamaExtError
from llama_ext.files import seal

T, WINDOWS = 16, 37
N = T * WINDOWS + 1  # token ids are their positions, so that a batch says what it was read from


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards of 100 tokens, whose boundaries fall inside windows; a tail shorter than a window."""
    return write_data_set(tmp_path_factory.mktemp("data") / "set", range(N), range(T * 5 + 4))


def rows(loader, count):
    """The first tokens of the next `count` windows, having checked each window."""
    starts = []
    while len(starts) < count:
        tokens, targets = next(loader)
        assert tokens.shape == targets.shape == (loader.batch_size, T)
        assert tokens.dtype == targets.dtype == torch.int64
        for row, following in zip(tokens.tolist(), targets.tolist()):
            assert row == list(range(row[0], row[0] + T))
            assert following == list(range(row[0] + 1, row[0] + T + 1))
            starts.append(row[0])
    return starts


@pytest.mark.parametrize("batch_size", [1, 4, 37, 50])
def test_an_epoch_has_every_target_once_whatever_the_batch(folder, batch_size):
    loader = TokenLoader(folder, batch_size=batch_size, seq_len=T)
    assert (loader.num_tokens, loader.num_windows) == (N, WINDOWS)
    starts = rows(loader, 3 * WINDOWS)
    epochs = [starts[i * WINDOWS:(i + 1) * WINDOWS] for i in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, N - 1, T))
    assert len(set(map(tuple, epochs))) == 3, "each epoch has an order of its own"
    assert epochs[0] != sorted(epochs[0])


def test_order_depends_on_the_seed_only(folder):
    first = rows(TokenLoader(folder, batch_size=4, seq_len=T, seed=1), WINDOWS)
    assert first[:36] == rows(TokenLoader(folder, batch_size=3, seq_len=T, seed=1), WINDOWS)[:36]
    assert first != rows(TokenLoader(folder, batch_size=4, seq_len=T, seed=2), WINDOWS)
    in_order = TokenLoader(folder, batch_size=1, seq_len=T, shuffle=False)
    assert rows(in_order, WINDOWS) == list(range(0, N - 1, T))


def test_order_is_the_same_in_another_process(folder):
    script = ("import sys, zlib; from llama_ext.data import TokenLoader\n"
              "loader = TokenLoader(sys.argv[1], batch_size=4, seq_len=16, seed=5)\n"
              "print(zlib.crc32(b''.join(next(loader)[1].numpy().tobytes() for _ in range(30))))")
    loader = TokenLoader(folder, batch_size=4, seq_len=T, seed=5)
    expected = zlib.crc32(b"".join(next(loader)[1].numpy().tobytes() for _ in range(30)))
    got = subprocess.run([sys.executable, "-c", script, folder], text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "77"}, stdout=subprocess.PIPE)
    assert int(got.stdout) == expected


def test_ranks_divide_each_global_batch(folder):
    whole = TokenLoader(folder, batch_size=6, seq_len=T)
    ranks = [TokenLoader(folder, batch_size=2, seq_len=T, rank=r, world_size=3) for r in range(3)]
    for _ in range(20):
        parts = [rows(loader, 2) for loader in ranks]
        assert sum(parts, []) == rows(whole, 6)
        assert {loader.epoch for loader in ranks} == {whole.epoch}


def test_resumes_at_the_very_window_with_another_batch_and_ranks(folder):
    loader = TokenLoader(folder, batch_size=5, seq_len=T, seed=3)
    rows(loader, 30)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = rows(loader, 60)
    again = TokenLoader(folder, batch_size=5, seq_len=T, seed=3)
    again.load_state_dict(state)
    assert rows(again, 60) == expected
    ranks = [TokenLoader(folder, batch_size=3, seq_len=T, seed=3, rank=r, world_size=2)
             for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    got = []
    for _ in range(10):
        got += rows(ranks[0], 3) + rows(ranks[1], 3)
    assert got == expected


@pytest.mark.parametrize("change, named", [
    ({"seed": 4}, "seed=3, this loader has 4"), ({"seq_len": 8}, "seq_len=16, .* has 8"),
    ({"split": "val"}, "split='train', .* has 'val'"), ({"shuffle": False}, "shuffle=True")])
def test_a_position_of_other_data_or_options_is_refused(folder, change, named):
    state = TokenLoader(folder, seq_len=T, seed=3).state_dict()
    other = TokenLoader(folder, **{"seq_len": T, "seed": 3, **change})
    with pytest.raises(LlamaExtError, match=f"cannot resume: .* {named}"):
        other.load_state_dict(state)
    with pytest.raises(LlamaExtError, match="position of 0 or more, got None"):
        TokenLoader(folder, seq_len=T, seed=3).load_state_dict({**state, "position": None})


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (2, 1), (4, 2), (3, 4), (100, 2)])
def test_one_pass_has_every_target_once_over_all_ranks(folder, batch_size, world_size):
    seen, counts = [], set()
    for rank in range(world_size):
        loader = TokenLoader(folder, "val", batch_size, T, rank=rank, world_size=world_size)
        batches = list(loader.batches())
        counts.add(len(batches))
        for tokens, targets in batches:
            kept = targets != -100
            assert torch.equal(tokens[kept] + 1, targets[kept])
            seen += targets[kept].tolist()
    assert sorted(seen) == list(range(1, T * 5 + 4))
    assert len(counts) == 1, "all ranks have equally many batches"


def test_uint32_tokens(tmp_path):
    ids = range(1 << 20, (1 << 20) + 40)
    folder = write_data_set(tmp_path / "set", ids, vocab_size=1 << 21, dtype="uint32")
    tokens, _ = next(TokenLoader(folder, batch_size=1, seq_len=39))
    assert tokens[0].tolist() == list(ids)[:39]


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"seq_len": -1}, "seq_len must be at least 1, got -1"),
    ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ({"split": "test"}, "split must be 'train' or 'val', got 'test'")])
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        TokenLoader(folder, **options)


def test_missing_and_truncated_shards_show_on_opening(tmp_path):
    folder = write_data_set(tmp_path / "set", range(N))
    halve(folder / "f" / "train-3.bin")
    with pytest.raises(LlamaExtError, match=r"train-3.bin: truncated .* expected 200 bytes, got 1"):
        TokenLoader(folder)
    (folder / "f" / "train-3.bin").unlink()
    with pytest.raises(LlamaExtError, match="train-3.bin: cannot open: No such file"):
        TokenLoader(folder)


def test_a_flipped_bit_shows_in_verify(tmp_path):
    folder = write_data_set(tmp_path / "set", range(N))
    verify(folder)
    flip_bit(folder / "f" / "train-2.bin")
    with pytest.raises(LlamaExtError, match="train-2.bin: damaged: expected sha256 .*, got"):
        verify(folder)


def test_an_id_outside_the_vocabulary_shows_on_reading(tmp_path):
    folder = write_data_set(tmp_path / "set", range(40), vocab_size=30)
    with pytest.raises(LlamaExtError, match="train-0.bin: .* below the vocabulary size 30, got 39"):
        next(TokenLoader(folder, batch_size=1, seq_len=39))


def test_a_split_too_short_for_a_window(tmp_path):
    folder = write_data_set(tmp_path / "set", range(T), [1])
    with pytest.raises(LlamaExtError, match="train split must have at least 17 tokens, got 16"):
        next(TokenLoader(folder, seq_len=T))
    with pytest.raises(LlamaExtError, match="val split must have at least 2 tokens, got 1"):
        next(TokenLoader(folder, "val", seq_len=T).batches())


def test_missing_or_damaged_meta(tmp_path):
    path = tmp_path / "set" / "meta.json"
    with pytest.raises(LlamaExtError, match="set: no meta.json here, .* `llama-ext prepare`"):
        load_meta(tmp_path / "set")
    write_data_set(tmp_path / "set", range(N))
    whole = path.read_bytes()
    for damage in (flip_bit, halve, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"[1]"),
                   lambda p: p.write_bytes(b"\xff"), lambda p: p.write_bytes(b"{}"),
                   lambda p: p.write_bytes(whole.replace(b"65536", b"65537"))):
        path.write_bytes(whole)
        load_meta(tmp_path / "set")
        damage(path)
        with pytest.raises(LlamaExtError, match="meta.json: not the .* of a data set, or damaged"):
            TokenLoader(tmp_path / "set")
    path.write_bytes(seal({"format": "llama_ext tokens 1"}))
    with pytest.raises(LlamaExtError, match="expected format '.*2', got '.*1'"):
        load_meta(tmp_path / "set")
