"""Checkpoints of many processes: read by any number of them, split in any way, and by one."""

import functools
import os

import pytest
import torch
import torch.distributed as dist

import processes
from corpus import flip_bit, full_disk, halve, write_tokenizer
from llama_ext import checkpoint, parallel
from llama_ext.convert import convert
from llama_ext.errors import LlamaExtError
from llama_ext.model import Llama
from llama_ext.optim import build_optimizer
from test_parallel import batches, config

SHAPE = {"vocab_size": 310, "n_layers": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The bytes of a tokenizer's file."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer")).read_bytes()


def build(tp=None, optimizer="adamw", seed=0, **shape):
    """A model and its optimizer, in one process or split over the processes there are."""
    shape = config(**{**SHAPE, **shape})
    model = Llama(shape, device="meta")
    if tp:
        model.mesh = parallel.mesh(shape, tp)
        parallel.parallelize(model, model.mesh)
    parallel.reset_parameters(model.to_empty(device="cpu"), seed)
    return model, build_optimizer(model, optimizer, lr=0.01)


def step(model, optimizer, number):
    dp, rank = 1, 0
    if dist.is_initialized():
        dp, rank = model.mesh["dp"].size(), model.mesh["dp"].get_local_rank()
    model(*batches(number, dp)[rank]).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model, optimizer):
    """{name: tensor} of all weights and optimizer state."""
    tensors = dict(model.named_parameters())
    for name, p in model.named_parameters():
        tensors |= {f"{name} {slot}": value for slot, value in optimizer.state[p].items()}
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
            for name, t in tensors.items()}


def train_and_save(folder, tp, optimizer, tokenizer):
    """What is saved after 2 steps, and what comes of 2 more."""
    model, opt = build(tp, optimizer)
    for number in (1, 2):
        step(model, opt, number)
    saved = whole(model, opt)
    checkpoint.save(folder, 2, model, opt, {"loader": {"position": 7}}, tokenizer=tokenizer)
    for number in (3, 4):
        step(model, opt, number)
    return saved, whole(model, opt)


def load(folder, tp, optimizer, more=0):
    """What is loaded from the newest checkpoint, and what comes of some more steps."""
    model, opt = build(tp, optimizer, seed=1)
    path = checkpoint.latest(folder)
    assert checkpoint.read_state(path) == (2, {"loader": {"position": 7}})
    checkpoint.load(path, model, opt)
    loaded = whole(model, opt)
    for number in range(3, 3 + more):
        step(model, opt, number)
    return loaded, whole(model, opt)


def save_then_load(runs, tokenizer):
    """{(tp of the save, tp of the load, optimizer): what was saved, what came of it, what is
    loaded, what comes of that}."""
    out = {}
    for tp, optimizer, folder in runs:
        saved = train_and_save(folder, tp, optimizer, tokenizer)
        for other in (1, 2):
            out[tp, other, optimizer] = saved + load(folder, other, optimizer, 2)
    return out


def load_all(folders, tps=(1, 2)):
    return [load(folder, tp, optimizer)[0] for folder, optimizer in folders for tp in tps]


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """[(folder, optimizer, what is saved)] of one process and of two, and what two got from it."""
    root = tmp_path_factory.mktemp("runs")
    plan = [(1, "adamw", root / "a"), (2, "adamax", root / "b")]
    return plan, processes.run(2, save_then_load, plan, tokenizer)[0]


def test_two_processes_go_on_bitwise_the_same(runs):
    for (tp, other, optimizer), (saved, later, loaded, later_too) in runs[1].items():
        assert same(saved, loaded), (tp, other, optimizer)
        assert same(later, later_too) == (tp == other), (tp, other, optimizer)


def test_one_process_reads_the_shards_of_two(runs):
    for tp, optimizer, folder in runs[0]:
        assert same(load(folder, None, optimizer)[0], runs[1][tp, tp, optimizer][0])
        assert not (checkpoint.latest(folder) / "model.safetensors").exists()


def test_one_of_one_and_four_processes_read_what_one_and_two_wrote(runs, tmp_path, tokenizer):
    expected = [(folder, optimizer, runs[1][tp, tp, optimizer][0])
                for tp, optimizer, folder in runs[0]]
    expected.append((tmp_path, "adamw", train_and_save(tmp_path, None, "adamw", tokenizer)[0]))
    assert (checkpoint.latest(tmp_path) / "model.safetensors").exists()
    alone = processes.run(1, load_all, [pair[:2] for pair in expected], (1,))[0]
    assert all(same(got, saved) for got, (_, _, saved) in zip(alone, expected))
    loaded = processes.run(4, load_all, [pair[:2] for pair in expected])
    for rank in loaded:
        for i, (folder, _, saved) in enumerate(expected):
            assert same(rank[2 * i], saved) and same(rank[2 * i + 1], saved), folder


def test_model_and_tokenizer_for_generation_come_from_shards(runs):
    tp, optimizer, folder = runs[0][1]
    path = checkpoint.find(folder)
    assert checkpoint.find(path.rename(folder / "copied")) == folder / "copied"
    model, tokenizer = checkpoint.load_model(folder / "copied")
    (folder / "copied").rename(path)
    saved = runs[1][tp, tp, optimizer][0]
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert tokenizer.vocab_size == 310 and model(torch.tensor([[1, 2]])).shape == (1, 2, 310)


def test_shards_are_converted(runs, tmp_path):
    tp, optimizer, folder = runs[0][1]
    convert(folder, tmp_path / "meta", to="meta", dtype="float32")
    saved = runs[1][tp, tp, optimizer][0]
    tensors = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    assert tensors and all(torch.equal(tensor, saved[name]) for name, tensor in tensors.items()
                           if name in saved)
    assert {name for name in saved if " " not in name} <= tensors.keys()


def refusal(folder, **shape):
    path = checkpoint.latest(folder)
    try:
        checkpoint.read_state(path)
        checkpoint.load(path, *build(1, **shape))
    except LlamaExtError as error:
        return str(error)


def test_a_damaged_shard_is_named_by_every_rank(runs, tokenizer):
    _, _, folder = runs[0][0]
    path = checkpoint.latest(folder)
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert names == ["config.json", "shards/.metadata", "shards/__0_0.distcp",
                     "shards/__1_0.distcp", "state.json", "tokenizer.model"]
    for name, damage in zip(names, (flip_bit, halve, os.remove, flip_bit, halve, os.remove)):
        data = (path / name).read_bytes()
        damage(path / name)
        with pytest.raises(LlamaExtError, match=f"{name} (is damaged|cannot be read)") as error:
            checkpoint.read_state(path)
        with pytest.raises(LlamaExtError, match=f"{name} (is damaged|cannot be read)"):
            checkpoint.load_model(path)
        if name.startswith("shards/__1"):
            assert processes.run(2, refusal, folder) == [str(error.value)] * 2
        (path / name).write_bytes(data)
    checkpoint.read_state(path)


def test_another_models_shards_are_refused_by_every_rank(runs):
    _, _, folder = runs[0][0]
    first, second = processes.run(2, functools.partial(refusal, n_layers=3), folder)
    assert first == second and "does not fit the model: layers.2." in first


def fail_to_save(folder, room, tokenizer):
    """Ends of two saves, of which the disk has room for the first, then of one of all."""
    model, opt = build(1)
    step(model, opt, 1)
    checkpoint.save(folder, 1, model, opt, tokenizer=tokenizer)
    ends = []
    for rank in (0, 1):
        with full_disk(room if dist.get_rank() == rank else 10 ** 9):
            try:
                checkpoint.save(folder, 2, model, opt, tokenizer=tokenizer, keep=1)
            except LlamaExtError as error:
                ends.append(str(error))
            dist.barrier()
        ends.append(sorted(os.listdir(folder)))
        dist.barrier()
    checkpoint.read_state(checkpoint.latest(folder))
    return ends


@pytest.mark.parametrize("room", [0, 5000])
def test_a_full_disk_on_one_rank_leaves_the_earlier_checkpoints(tmp_path, tokenizer, room):
    first, second = processes.run(2, fail_to_save, tmp_path, room, tokenizer)
    assert len(first) == 4
    for ends in (first, second):
        for message, files in (ends[:2], ends[2:]):
            assert "step-00000002 cannot be written" in message and files == ["step-00000001"]


PLACES = {"while writing shards": (checkpoint, "_write_tensors"), "then": (os, "fsync"),
          "before the rename": (checkpoint.Path, "rename"), "after it": (checkpoint, "_remove")}


def killed_save(folder, place, tokenizer):
    """Rank 0 is killed at a place of its second save; rank 1 waits for it no longer."""
    model, opt = build(1)
    step(model, opt, 1)
    checkpoint.save(folder, 1, model, opt, tokenizer=tokenizer)
    if dist.get_rank() == 0:
        setattr(*PLACES[place], lambda *args, **options: os._exit(0))
    try:
        checkpoint.save(folder, 2, model, opt, tokenizer=tokenizer, keep=1)
    except BaseException:
        os._exit(0)


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_save_leaves_nothing_that_counts(tmp_path, tokenizer, place):
    with pytest.raises(AssertionError, match="^rank 0 died: exit code 0"):
        processes.run(2, killed_save, tmp_path, place, tokenizer)
    found = checkpoint.steps(tmp_path)
    assert found[0].name == "step-00000001" and len(found) == 1 + (place == "after it")
    for path in found:
        checkpoint.read_state(path)
    checkpoint.save(tmp_path, 3, *build(), tokenizer=tokenizer, keep=1)
    assert os.listdir(tmp_path) == ["step-00000003"]
