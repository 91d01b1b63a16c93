"""Mixtures of data sets: shares at every prefix, order on any number of ranks, resuming, what is
wrong with a mixture's file or its sources, and training on one."""

import json
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import llama_ext
from corpus import flip_bit, halve, write_data_set, write_texts
from llama_ext import cli
from llama_ext.data import TokenLoader, load_meta
from llama_ext.errors import LlamaExtError
from llama_ext.mixture import MixtureLoader, _turns, load_mixture, open_loader
from llama_ext.prepare import prepare
from llama_ext.train import TrainConfig, Trainer, train

T = 8
SIZES = {"a": 41, "b": 8, "c": 15}  # windows; ids tell the source: a from 0, b 1000, c 2000
SHARES = {"a": 0.625, "b": 0.25, "c": 0.125}


def write_mixture(path, shares, **more):
    path.write_text(json.dumps({"sources": {name: {"path": f"sets/{name}", "share": share}
                                            for name, share in shares.items()}, **more}))
    return path


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    for i, (name, windows) in enumerate(SIZES.items()):
        write_data_set(folder / "sets" / name, range(1000 * i, 1000 * i + windows * T + 1),
                       range(1000 * i + 500, 1000 * i + 500 + 3 * T + i))
    return write_mixture(folder / "mixture.json", SHARES)


def rows(loader, count):
    """The first ids of the next `count` windows, having checked each window."""
    starts = []
    while len(starts) < count:
        tokens, targets = next(loader)
        assert tokens.shape == targets.shape == (loader.batch_size, T)
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(T))
        assert torch.equal(targets, tokens + 1)
        starts += tokens[:, 0].tolist()
    return starts


@pytest.mark.parametrize("parts", [
    [134, 30, 9, 9, 9, 5, 4], [1], [1, 1], [999, 1], [1, 999], [333, 333, 334],
    *([random.Random(i).randint(1, 40) for _ in range(random.Random(i).randint(2, 12))]
      for i in range(30))])
def test_every_prefix_has_the_shares_to_less_than_a_window(parts):
    taken, period = [0] * len(parts), sum(parts)
    for n, (j, window) in enumerate(_turns(parts), 1):
        assert window == taken[j]
        taken[j] += 1
        assert all(abs(t - Fraction(n * p, period)) < 1 for t, p in zip(taken, parts))
    assert taken == parts


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_source_is_a_token_loader_of_its_own(mixture, batch_size):
    loader = MixtureLoader(mixture, batch_size=batch_size, seq_len=T, seed=3)
    starts = rows(loader, 336)
    for n in range(len(starts) + 1):
        for i, name in enumerate(SIZES):
            count = sum(start // 1000 == i for start in starts[:n])
            assert abs(count - n * SHARES[name]) < 1
    for i, name in enumerate(SIZES):
        own = TokenLoader(mixture.parent / "sets" / name, batch_size=1, seq_len=T, seed=3)
        mine = [start for start in starts if start // 1000 == i]
        assert mine == rows(own, len(mine)) and len(mine) > 2 * SIZES[name]  # epochs
    assert starts != rows(MixtureLoader(mixture, batch_size=batch_size, seq_len=T, seed=4), 336)


def test_counts_are_what_was_yielded(mixture):
    loader = MixtureLoader(mixture, batch_size=5, seq_len=T)
    for n in range(0, 60, 5):
        seen = loader.counts()
        starts = rows(MixtureLoader(mixture, batch_size=n, seq_len=T), n) if n else []
        assert sum(count["windows"] for count in seen.values()) == n
        for i, name in enumerate(SIZES):
            windows = sum(start // 1000 == i for start in starts)
            assert seen[name] == {"windows": windows, "tokens": windows * T,
                                  "epochs": windows / SIZES[name]}
        next(loader)
    assert loader.progress() == ("a 304 tokens (0.93 epochs), b 120 tokens (1.88 epochs), "
                                 "c 56 tokens (0.47 epochs)")


def test_ranks_divide_each_global_batch(mixture):
    whole = MixtureLoader(mixture, batch_size=6, seq_len=T)
    ranks = [MixtureLoader(mixture, batch_size=2, seq_len=T, rank=r, world_size=3)
             for r in range(3)]
    for _ in range(30):
        assert sum((rows(loader, 2) for loader in ranks), []) == rows(whole, 6)
        assert all(loader.counts() == whole.counts() for loader in ranks)


@pytest.mark.parametrize("taken", [0, 35, 400])
def test_resumes_at_the_very_window_with_another_batch_and_ranks(mixture, taken):
    loader = MixtureLoader(mixture, batch_size=5, seq_len=T, seed=3)
    rows(loader, taken)
    state, counts = json.loads(json.dumps(loader.state_dict())), loader.counts()
    expected = rows(loader, 60)
    ranks = [MixtureLoader(mixture, batch_size=3, seq_len=T, seed=3, rank=r, world_size=2)
             for r in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
        assert loader.counts() == counts
    got = []
    for _ in range(10):
        got += rows(ranks[0], 3) + rows(ranks[1], 3)
    assert got == expected


def test_a_position_of_other_shares_sources_or_options_is_refused(mixture):
    state = MixtureLoader(mixture, seq_len=T, seed=3).state_dict()
    other = write_mixture(mixture.parent / "other.json", {"a": 0.5, "b": 0.375, "c": 0.125})
    for loader in (MixtureLoader(other, seq_len=T, seed=3),
                   MixtureLoader(mixture, seq_len=T, seed=4),
                   MixtureLoader(mixture, seq_len=4, seed=3),
                   MixtureLoader(mixture, "val", seq_len=T, seed=3),
                   TokenLoader(mixture.parent / "sets" / "a", seq_len=T, seed=3)):
        with pytest.raises(LlamaExtError, match="cannot resume: the saved position is for"):
            loader.load_state_dict(state)


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (2, 3)])
def test_one_pass_has_every_target_of_every_source_once(mixture, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        loader = MixtureLoader(mixture, "val", batch_size, T, rank=rank, world_size=world_size)
        for tokens, targets in loader.batches():
            kept = targets != -100
            assert torch.equal(tokens[kept] + 1, targets[kept])
            seen += targets[kept].tolist()
    assert sorted(seen) == [1000 * i + 500 + j for i in range(3) for j in range(1, 3 * T + i)]
    assert len(seen) == loader.num_targets == loader.num_tokens - 3
    assert loader.num_bytes == 3 * loader.num_tokens  # of write_data_set


def test_open_loader_takes_folders_and_mixtures(mixture):
    options = {"seed": 1, "rank": 1, "world_size": 2, "shuffle": False}
    for path, kind in ((mixture, MixtureLoader), (mixture.parent / "sets" / "a", TokenLoader)):
        loader = open_loader(str(path), "val", 3, T, **options)
        assert type(loader) is kind
        assert {name: getattr(loader, name) for name in options} == options
        assert (loader.split, loader.batch_size, loader.seq_len) == ("val", 3, T)
    with pytest.raises(ValueError, match="MixtureLoader: batch_size must be at least 1, got 0"):
        open_loader(mixture, batch_size=0)


def test_the_papers_mixture():
    """Table 1 of the paper: seven sources; a turn of 200 windows."""
    path = Path(llama_ext.__file__).parent / "mixtures" / "llama.json"
    shares = {name: source["share"] for name, source in
              json.loads(path.read_text())["sources"].items()}
    assert shares == {"CommonCrawl": 0.67, "C4": 0.15, "GitHub": 0.045, "Wikipedia": 0.045,
                      "Books": 0.045, "ArXiv": 0.025, "StackExchange": 0.02}
    with pytest.raises(LlamaExtError, match="mixtures/commoncrawl: no meta.json here"):
        load_mixture(path)


SOURCE = '{"path": "sets/a", "share": 1}'


@pytest.mark.parametrize("text, message", [
    ("{", "expected a mixture in JSON: "), ("\xff", "expected a mixture in JSON: "),
    ("[]", r"mixture: expected an object with sources, got \[\]"),
    ('{"source": {}}', r"mixture: expected an object with sources, got \['source'\]"),
    ('{"sources": {}}', "sources: expected one object per source, got {}"),
    ('{"sources": [1]}', "sources: expected one object per source, got "),
    ('{"sources": {"x": 1}}', "x: expected an object with path and share, got 1"),
    ('{"sources": {"x": {"path": "p"}}}', r"x: expected an .* path and share, got \['path'\]"),
    (f'{{"sources": {{"x": {SOURCE[:-1]}, "epochs": 2}}}}}}', r"x: expected .*got \['epochs', 'p"),
    (f'{{"sources": {{"x": {SOURCE}, "x": {SOURCE}}}}}', "expected every name once, got 'x' twice"),
    (SOURCE.join(('{"sources": {"x": ', "}}")).replace('"sets/a"', "7"), "x: path: expected .*7"),
    *((SOURCE.join(('{"sources": {"x": ', "}}")).replace("1", share), f"x: share: {message}")
      for share, message in (("0", "expected a number above 0 and at most 1, got 0"),
                             ("-0.5", "expected a number above 0 .* got -0.5"),
                             ("1.5", "expected .* at most 1, got 1.5"),
                             ("true", "expected a number .* got True"),
                             ("NaN", "expected a number .* got nan"),
                             ('"1"', "expected a number .* got 1"),
                             ("0.0000001", "expected at most 6 decimals, got 1E-7"),
                             ("0.9", None))),
])
def test_a_wrong_mixture_is_one_sentence(mixture, text, message):
    path = mixture.parent / "wrong.json"
    path.write_text(text, encoding="latin-1")
    if message.endswith("None"):
        message = "expected shares that sum to 1, got 0.9"
    with pytest.raises(LlamaExtError, match=f"^{re.escape(str(path))}: {message}"):
        MixtureLoader(path)


def test_missing_files_damage_and_other_tokenizers(tmp_path):
    with pytest.raises(LlamaExtError, match="none.json: cannot read the mixture: No such file"):
        load_mixture(tmp_path / "none.json")
    path = write_mixture(tmp_path / "m.json", {"a": 0.5, "b": 0.5})
    write_data_set(tmp_path / "sets/a", range(100), range(10))
    with pytest.raises(LlamaExtError, match="sets/b: no meta.json here"):
        MixtureLoader(path)
    write_data_set(tmp_path / "sets/b", range(100), range(1), tokenizer="b")
    with pytest.raises(LlamaExtError, match=r"expected one tokenizer in all sources, got \w{12}... "
                                            r"in a and \w{12}... in b; prepare every"):
        MixtureLoader(path)
    write_mixture(path, {"a": 0.5, "c": 0.5})
    write_data_set(tmp_path / "sets/c", range(100), range(1))
    with pytest.raises(LlamaExtError, match="sets/a: the train split must have at least 101 tok"):
        MixtureLoader(path, seq_len=100)
    with pytest.raises(LlamaExtError, match="sets/c: the val split must have at least 2 tokens"):
        MixtureLoader(path, "val")
    loader = MixtureLoader(path, seq_len=T)
    loader.verify()
    shard = tmp_path / "sets/c/f/train-0.bin"
    flip_bit(shard)
    with pytest.raises(LlamaExtError, match="sets/c/f/train-0.bin: damaged"):
        loader.verify()
    halve(shard)
    with pytest.raises(LlamaExtError, match="sets/c/f/train-0.bin: truncated"):
        MixtureLoader(path, seq_len=T)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A mixture of two prepared sets with one tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    for i, name in enumerate("ab"):
        write_texts(folder / name, 40 - 20 * i, seed=i)
        model = {"tokenizer": folder / "sets" / "a" / load_meta(folder / "sets" / "a")["folder"]
                 / "tokenizer.model"} if i else {"vocab_size": 320}
        prepare([folder / name], folder / "sets" / name, val_fraction=0.1, progress=False, **model)
    return write_mixture(folder / "m.json", {"a": 0.75, "b": 0.25})


def test_training_on_a_mixture_resumes_bitwise_and_reports(texts, one_thread, tmp_path, capsys):
    def config(run, steps=6, **options):
        return TrainConfig(**{"data": str(texts), "run": str(tmp_path / run), "dim": 32,
                              "n_layers": 1, "n_heads": 2, "seq_len": 32, "batch_size": 3,
                              "dtype": "fp32", "steps": steps, "warmup": 1, "save_every": 3,
                              **options})
    whole = train(config("whole"))
    assert "trained on a 448 tokens (0." in capsys.readouterr().out
    trainer = Trainer(config("parts"))
    for _ in range(3):
        trainer._update()
    trainer._save()
    trainer.close()
    parts = train(config("parts"))
    weights = [Path(r["checkpoint"], "model.safetensors").read_bytes() for r in (whole, parts)]
    assert weights[0] == weights[1] and whole["val_loss"] == parts["val_loss"]

    trainer = Trainer(config("whole"))  # one pass over both, by hand
    nats, count, size = 0.0, 0, 0
    for loader in trainer.val.loaders.values():
        assert loader.num_targets > 50
        for tokens, targets in loader.batches():
            n = int((targets != -100).sum())
            nats, count = nats + trainer.model(tokens, targets).item() * n, count + n
        size += (loader.files / "val.txt").stat().st_size
    trainer.close()
    assert whole["val_loss"] == pytest.approx(nats / count, rel=1e-6)
    assert trainer.val_bytes == size

    other = write_mixture(texts.parent / "other.json", {"a": 0.5, "b": 0.5})
    with pytest.raises(LlamaExtError, match="cannot be resumed: it has data='"):
        Trainer(config("whole", data=str(other)))


def test_the_command_shows_shares_and_epochs(texts, capsys):
    tokens = {name: load_meta(texts.parent / "sets" / name)["train"]["tokens"] for name in "ab"}
    assert cli.main(["mixture", str(texts), "--tokens", "100k"]) == 0
    shown = capsys.readouterr().out
    for name, share in (("a", 0.75), ("b", 0.25)):
        epochs = share * 100_000 / tokens[name]
        assert re.search(rf"^{name} +{100 * share:g} % +{tokens[name]:,} +[\d,]+ +{epochs:.2f}$",
                         shown, re.MULTILINE), shown
    assert cli.main(["mixture", str(texts)]) == 0
    assert "epochs" not in capsys.readouterr().out
    assert cli.main(["mixture", str(texts), "--tokens=0"]) == 2
    assert "--tokens: expected at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["mixture", "none.json"]) == 1
    assert "none.json: cannot read the mixture" in capsys.readouterr().err
