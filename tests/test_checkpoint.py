"""Checkpoints: exact round trips, the last k, damage, full disks, killed saves."""

import json
import os

import pytest
import torch

from corpus import flip_bit, full_disk, halve, write_texts
from llama_ext import checkpoint
from llama_ext.errors import LlamaExtError
from llama_ext.model import Llama, LlamaConfig
from llama_ext.optim import build_optimizer
from llama_ext.tokenizer import Tokenizer

FILES = ["config.json", "model.safetensors", "state.json", "tokenizer.model",
         "training.safetensors"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The bytes of a tokenizer's file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [path.read_text() for path in write_texts(folder, 5)]
    Tokenizer.train(texts, folder / "t.model", 310)
    return (folder / "t.model").read_bytes()


def small(seed=0, optimizer="adamw", steps=0, **shape):
    """A model and its optimizer, after some steps on random tokens."""
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 310,
                                 "hidden_dim": 48, "max_seq_len": 16, **shape}))
    optimizer = build_optimizer(model, optimizer, lr=0.01)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    tokens = torch.randint(0, 310, (2, 16))
    model(tokens, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_goes_on_bitwise_the_same(tmp_path, optimizer, tied):
    model, opt = small(optimizer=optimizer, steps=3, tie_embeddings=tied)
    checkpoint.save(tmp_path, 3, model, opt, {"loader": {"position": 7}})
    step(model, opt)
    other, other_opt = small(seed=1, optimizer=optimizer, tie_embeddings=tied)
    path = checkpoint.latest(tmp_path)
    assert checkpoint.read_state(path) == (3, {"loader": {"position": 7}})
    checkpoint.load(path, other, other_opt)
    step(other, other_opt)  # the same tokens: the random generator was put back as well
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(model.parameters(), other.parameters()):
        assert opt.state[a].keys() == other_opt.state[b].keys() != set()
        for slot, value in opt.state[a].items():
            assert torch.equal(value, other_opt.state[b][slot]), slot


def test_the_folder_alone_gives_model_and_tokenizer(tmp_path, tokenizer):
    model, _ = small()
    path = checkpoint.save(tmp_path, 1, model, tokenizer=tokenizer)
    loaded, words = checkpoint.load_model(path)
    assert loaded.config == model.config and words.vocab_size == 310
    tokens = torch.randint(0, 310, (1, 9))
    assert torch.equal(loaded(tokens), model(tokens))


def test_the_newest_are_kept_by_step_not_by_name(tmp_path):
    model, opt = small()
    for number in (5, 99_999_999, 100_000_000, 100_000_001):
        checkpoint.save(tmp_path, number, model, opt, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-100000000", "step-100000001"]
    assert sorted(os.listdir(tmp_path)) == ["step-100000000", "step-100000001"]
    checkpoint.save(tmp_path, 100_000_002, model, opt, keep=1)
    assert os.listdir(tmp_path) == ["step-100000002"]


def test_find_takes_a_run_or_a_checkpoint(tmp_path):
    with pytest.raises(LlamaExtError, match="expected a folder with model.safetensors or .* found"):
        checkpoint.find(tmp_path)
    with pytest.raises(LlamaExtError, match="nowhere"):
        checkpoint.find(tmp_path / "nowhere")
    model, _ = small()
    paths = [checkpoint.save(tmp_path, n, model) for n in (1, 2)]
    assert checkpoint.find(tmp_path) == paths[1] and checkpoint.find(paths[0]) == paths[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_bit, halve, os.remove])
def test_a_damaged_file_is_named_with_the_newest_whole_checkpoint(tmp_path, tokenizer, name,
                                                                      damage):
    model, opt = small(steps=1)
    for number in (1, 2):
        path = checkpoint.save(tmp_path, number, model, opt, tokenizer=tokenizer)
    damage(path / name)
    with pytest.raises(LlamaExtError, match=rf"step-00000002/{name} (is damaged|cannot be read).*; "
                                            r"\S*step-00000001 is whole: remove \S*step-00000002 "):
        checkpoint.read_state(path)
    if name != "training.safetensors":
        with pytest.raises(LlamaExtError, match=f"{name} (is damaged|cannot be read)"):
            checkpoint.load_model(path)
    damage(checkpoint.steps(tmp_path)[0] / name)
    with pytest.raises(LlamaExtError, match="; no other checkpoint in .* is whole"):
        checkpoint.read_state(path)


def test_a_changed_number_in_state_json_shows(tmp_path):
    path = checkpoint.save(tmp_path, 12, *small(), {"loader": {"position": 345}})
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("345", "346"))
    with pytest.raises(LlamaExtError, match="state.json is damaged: its checksum differs"):
        checkpoint.read_state(path)
    for text in ("[]", "{}", '{"crc32": 1}', "12"):
        (path / "state.json").write_text(text)
        with pytest.raises(LlamaExtError, match="state.json is damaged"):
            checkpoint.read_state(path)


def test_another_models_weights_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, *small())
    for shape in ({"dim": 16}, {"n_layers": 3}, {"n_layers": 1}):
        with pytest.raises(LlamaExtError, match="does not fit the model: .*expected .*, got .*"):
            checkpoint.load(path, *small(**shape))


def test_a_checkpoint_without_tokenizer_cannot_generate(tmp_path):
    path = checkpoint.save(tmp_path, 1, *small())
    with pytest.raises(LlamaExtError, match="expected tokenizer.model or tokenizer.json, found"):
        checkpoint.load_model(path)


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, tokenizer):
    model, opt = small(steps=1)
    path = checkpoint.save(tmp_path, 1, model, opt, tokenizer=tokenizer)
    sizes = [file.stat().st_size for file in path.iterdir()]
    for room in (0, min(sizes) - 1, 5000, max(sizes) - 1):
        with full_disk(room), pytest.raises(LlamaExtError, match="step-00000002 cannot be written"):
            checkpoint.save(tmp_path, 2, model, opt, tokenizer=tokenizer, keep=1)
        assert os.listdir(tmp_path) == ["step-00000001"]
    checkpoint.read_state(path)


def test_a_killed_save_leaves_nothing_that_counts(tmp_path, monkeypatch):
    """Every call that a save makes to the file system is the last one of some process."""
    model, opt = small(steps=1)
    checkpoint.save(tmp_path, 1, model, opt)

    class Killed(BaseException):
        pass

    def kill(*args, **options):
        raise Killed

    for place in ("st.save_model", "st.save_file", "_write", "fsync_folder", "Path.rename",
                  "_remove"):
        with monkeypatch.context() as patch:
            patch.setattr(f"llama_ext.checkpoint.{place}", kill)
            with pytest.raises(Killed):
                checkpoint.save(tmp_path, 2, model, opt, keep=1)
        for path in checkpoint.steps(tmp_path):
            checkpoint.read_state(path)
        assert checkpoint.steps(tmp_path)[0].name == "step-00000001"
    checkpoint.save(tmp_path, 3, model, opt, keep=1)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_state_holds_what_json_can(tmp_path):
    state = {"loader": {"position": 2 ** 60}, "options": {"lr": 0.1, "warmup": None}}
    path = checkpoint.save(tmp_path, 1, *small(), state)
    assert checkpoint.read_state(path) == (1, json.loads(json.dumps(state)))
