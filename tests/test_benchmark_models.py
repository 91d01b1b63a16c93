"""`python -m benchmarks models`: a whole model beside transformers'."""

import functools

import pytest
import torch

import llama_ext as lx
from benchmarks import models, result, timing
from benchmarks.__main__ import main
from llama_ext.estimate import flops_per_token
from tiny_benchmarks import tiny  # noqa: F401

PEERS = ["hf", "hf-patched"]
EAGERLY = functools.partial(torch.compile, backend="eager")  # a compiler that takes no time


@pytest.fixture
def model():
    torch.manual_seed(0)
    return lx.Llama(models.config_of("small"))


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(53, (2, 17))


def training(model, found):
    return models.training_row(timing.Clock("cpu"), model, found, "small", 2, 16, 2)


def test_twin_has_the_same_weights_in_the_same_memory(model):
    twin = models.transformers_twin(model)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    shared = {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}
    assert len(theirs) == len(ours) and len(shared) == len(ours) - 2 * model.config.n_layers
    assert twin.config._attn_implementation == "sdpa" and twin.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_providers_agree(dtype, monkeypatch, ids):
    monkeypatch.setattr(torch, "compile", EAGERLY)
    compile_config = models._compile_on_any_device()
    compile_config.backend = "eager"
    monkeypatch.setattr(models, "_compile_on_any_device", lambda: compile_config)
    torch.manual_seed(0)
    model = lx.Llama(models.config_of("small"), dtype=dtype)
    found = models.entrants(model, models.PROVIDERS)
    assert set(found) == set(models.PROVIDERS)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    true = models.loss_and_gradient(found["hf"], tokens, targets)
    for name, entrant in found.items():
        assert models.wrong_training(entrant, tokens, targets, true) is None, name
        assert models.wrong_generation(entrant, found["hf"], tokens, 5) is None, name


def test_patched_twin_runs_our_kernels(model, ids):
    found = models.entrants(model, ["hf", "hf-patched"])
    assert hasattr(type(found["hf-patched"].module), "_llama_ext_original")
    assert not hasattr(type(found["hf"].module), "_llama_ext_original")


def test_wrong_training_is_caught(model, ids):
    found = models.entrants(model, ["llama_ext", "hf"])
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    true = models.loss_and_gradient(found["hf"], tokens, targets)
    ours = found["llama_ext"]
    shifted = models.Entrant(model, lambda tokens, targets: model(tokens, tokens), None)
    assert models.wrong_training(shifted, tokens, targets, true).startswith("loss: expected")
    doubled = models.Entrant(model, lambda *args: (loss := ours.loss(*args)) * 2 - loss.detach(),
                             None)
    assert models.wrong_training(doubled, tokens, targets, true).startswith(
        "gradient of the embeddings: expected an error of at most 0.0003, got 1")


def test_wrong_generation_is_caught(model, ids):
    found = models.entrants(model, ["llama_ext", "hf"])
    ours = found["llama_ext"].generate
    for generate, sentence in (
            (lambda prompt, n: (ours(prompt, n) + 1) % 53, "generation: expected tokens within"),
            (lambda prompt, n: ours(prompt, n - 1), "generation: expected ids (2, 5), got (2, 4)")):
        wrong = models.wrong_generation(models.Entrant(model, None, generate), found["hf"], ids, 5)
        assert wrong.startswith(sentence)


def test_training_row(model):
    row = training(model, models.entrants(model, ["llama_ext", "hf", "hf-patched"]))
    assert set(row["providers"]) == {"llama_ext", "hf", "hf-patched"} and row["work"] == 32
    ours = row["providers"]["llama_ext"]
    flops = 32 * flops_per_token(model.config, 16)
    assert ours["share"] == pytest.approx(flops / row["limit_rate"] / ours["seconds"])
    assert ours["rate"] == pytest.approx(32 / ours["seconds"])
    kept = {name: entry["kept_bytes"] for name, entry in row["providers"].items()}
    assert kept["llama_ext"] < kept["hf-patched"] < kept["hf"]
    assert all(p.grad is None for p in model.parameters())


def test_more_figures_of_a_training_row():
    row = {"work": 2, "providers": {"llama_ext": {"kept_bytes": 4000, "peak_bytes": 2e9,
                                                  "mfu": 0.5}, "hf": {"kept_bytes": 6000}}}
    assert models._more(row).splitlines() == [
        "    kept for the backward, bytes per token: llama_ext 2,000, hf 3,000",
        "    peak memory beside the weights, GB: llama_ext 2.00",
        "    MFU by the data sheet, %: llama_ext 50.0"]


def test_generation_rows(model, monkeypatch):
    """Prompt: the time of one token; decode: what `new` further ones add to it."""
    waits = {"first": 0.5, "all": 2.5}
    monkeypatch.setattr(models, "interleave", lambda clock, entrants, rounds: {
        key: [[1.0 if key in ("copy", "matmul") else waits[key[1]]]] * rounds for key in entrants})
    found = models.entrants(model, ["llama_ext", "hf"])
    limits = timing.Limits(timing.Clock("cpu"), torch.float32)
    prompt, decode = models.generation_rows(timing.Clock("cpu"), model, found, "small", 1, 8, 4, 2)
    assert prompt["providers"]["llama_ext"]["rate"] == 8 / 0.5
    assert decode["providers"]["hf"]["rate"] == 4 / 2.0
    weights = 4 * (model.num_parameters() - model.tok_embeddings.weight.numel())
    assert decode["providers"]["hf"]["share"] == pytest.approx(
        4 * weights / limits.work["copy"] / 2.0)
    head = 2 * 53 * 32
    flops = 8 * (flops_per_token(model.config, 8, training=False) - head) + head
    assert prompt["providers"]["hf"]["share"] == pytest.approx(
        flops / limits.work["matmul"] / 0.5)


def test_what_would_take_too_long_is_left_out(model, monkeypatch):
    monkeypatch.setattr(models, "LONGEST", 0)
    row = training(model, models.entrants(model, ["llama_ext", "hf"]))
    assert row["providers"] == {} and set(row["left_out"]) == {"llama_ext", "hf"}
    assert row["left_out"]["hf"].endswith("so that it would take longer than 0 s")
    assert " - " in result.line(row, ["llama_ext", "hf"])
    monkeypatch.setattr(models, "LONGEST_PROMPT", 0)
    clock = timing.Clock("cpu")
    for row in models.generation_rows(clock, model, {"hf": None}, "small", 1, 8, 4, 2):
        assert row["providers"] == {} and set(row["left_out"]) == {"hf"}


def test_command(tmp_path, capsys, monkeypatch):
    path = tmp_path / "m.json"
    options = ["models", "--peers", *PEERS, "--dtypes", "fp32", "--batch", "2", "--tokens", "16",
               "--prompt", "8", "--new", "4", "--rounds", "2", "--threads", "1"]
    assert main([*options, "--json", str(path), "--plots", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "kept for the backward, bytes per token: llama_ext " in printed
    found = result.load(path)
    assert [r["direction"] for r in found["rows"]] == ["training step", "prompt", "decode"]
    assert all(set(r["providers"]) == {"llama_ext", *PEERS} for r in found["rows"])
    assert (tmp_path / "overview.svg").exists()
    monkeypatch.setattr(models, "missing", lambda: dict.fromkeys(PEERS, "is not installed"))
    assert main(options) == 0  # without transformers ours is still measured
    assert "left out: hf: is not installed" in capsys.readouterr().out


def test_fault_of_a_provider_is_named(model, monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler\nfound")
    found = models.entrants(model, ["llama_ext", "hf"])
    found["hf-compile"] = models.Entrant(found["hf"].module, broken, broken)
    row = training(model, found)
    assert row["wrong"] == {"hf-compile": "RuntimeError: no compiler"}
    assert set(row["providers"]) == {"llama_ext", "hf"}


def test_positions_beyond_the_preset_and_one_new_token(capsys):
    assert main(["models", "--peers", "hf", "--dtypes", "fp32", "--layers", "1", "--batch", "1",
                 "--tokens", "96", "--prompt", "80", "--new", "1", "--rounds", "1"]) == 0
    assert "small 32 x 1, 1 x 80 + 1" in capsys.readouterr().out


def test_wrong_provider_ends_in_an_exit_code(monkeypatch, capsys):
    def off(model):
        return models.Entrant(model, lambda *args: model(*args) * 1.01, ours(model).generate)
    ours = models._ours
    monkeypatch.setattr(models, "_ours", off)
    assert main(["models", "--peers", "hf", "--dtypes", "fp32", "--batch", "1", "--tokens", "8",
                 "--prompt", "8", "--new", "2", "--rounds", "2", "--threads", "1"]) == 1
    assert "WRONG, not timed: llama_ext in model fp32: loss: expected" in capsys.readouterr().out
