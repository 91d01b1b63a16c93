"""The estimates: exact counts against the model and torch's counter, and the paper's figures."""

import dataclasses
import math
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import llama_ext as lx
from benchmarks.memory import block_function, kept_bytes
from llama_ext import cli, estimate, layers, model
from llama_ext.estimate import (EstimateConfig, fits, fitting_plan, flops_per_token, memory,
                                num_parameters, report)
from llama_ext.quantity import count, rate, tokens
from llama_ext.quantize import quantize_

PAPER = {  # parameters, tokens, GPU-hours on A100-80GB (arXiv 2302.13971, tables 2 and 15)
    "7B": (6_738_415_616, 1.0e12, 82_432), "13B": (13_015_864_320, 1.0e12, 135_168),
    "33B": (32_528_943_616, 1.4e12, 530_432), "65B": (65_285_660_672, 1.4e12, 1_022_362)}
TINY = {"dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": 97, "hidden_dim": 80,
        "max_seq_len": 16}


@pytest.mark.parametrize("more", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True},
                                  {"n_kv_heads": 2, "head_dim": 20}])
def test_parameters_are_the_models(more):
    config = lx.LlamaConfig(**TINY, **more)
    assert num_parameters(config) == lx.Llama(config).num_parameters()


@pytest.mark.parametrize("preset", PAPER)
def test_parameters_are_the_papers(preset):
    assert num_parameters(lx.LlamaConfig.preset(preset)) == PAPER[preset][0]


@pytest.mark.parametrize("more", [{}, {"n_kv_heads": 2}, {"tie_embeddings": True},
                                  {"n_kv_heads": 2, "head_dim": 20}])
def test_flops_are_those_torch_counts(monkeypatch, more):
    """Of the model made of the ops' definitions in PyTorch, which compute masked scores too."""
    for name in ("rmsnorm", "rmsnorm_residual", "swiglu", "attention", "rope_qk"):
        monkeypatch.setattr(layers, name, getattr(lx.ref, name))
    monkeypatch.setattr(model, "linear_cross_entropy", lx.ref.linear_cross_entropy)
    monkeypatch.setattr(model, "why_composed", lambda block: "its ops are replaced")
    config = lx.LlamaConfig(**TINY, **more)
    B, T = 2, 16
    ids = torch.randint(97, (B, T))
    llama = lx.Llama(config)
    with FlopCounterMode(display=False) as forward:
        loss = llama(ids, ids)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    per_token = flops_per_token(config, T, training=False, causal=False)
    assert forward.get_total_flops() == B * T * per_token
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == B * T * flops_per_token(config, T, causal=False)
    half = flops_per_token(config, T)
    assert flops_per_token(config, T, causal=False) - half == 6 * 3 * T * config.q_dim
    output = 2 * 97 * 48  # is not computed again
    assert flops_per_token(config, T, recompute=True) == half + half / 3 - output


def test_the_papers_65b_run():
    """2,048 A100-80GB, 4M tokens a batch: 380 tokens/s/GPU, about 21 days for 1.4T tokens."""
    plan = EstimateConfig(preset="65B", gpus=2048)
    config = plan.model_config()
    assert estimate.speed(config, plan) == pytest.approx(380, rel=2e-3)
    assert fits(config, plan)
    text, change = report(plan)
    assert change is None and "a forward pass       4,194,304 tokens" in text
    assert float(re.search(r"1.4T tokens take ([\d.]+) days on 2,048 GPUs", text)[1]) == (
        pytest.approx(20.8, abs=0.1))


@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_gpu_hours_at_the_utilization_of_its_65b_run(preset):
    """All four within 9 %; the 7B's run was slower than that, the 13B's faster."""
    plan = EstimateConfig(preset=preset)
    config = plan.model_config()
    assert plan.total_tokens(config) == PAPER[preset][1]
    hours = PAPER[preset][1] / estimate.speed(config, plan) / 3600
    assert hours == pytest.approx(PAPER[preset][2], rel=0.09)


def test_inference_on_one_80_gb_card():
    def needed(preset, **options):
        plan = EstimateConfig(preset=preset, inference=True, **options)
        return fits(plan.model_config(), plan), memory(plan.model_config(), plan)

    fit, parts = needed("13B")
    assert fit and parts["weights"] == 2 * PAPER["13B"][0]
    assert parts["KV cache"] == 2 * 40 * 2048 * 5120 * 2
    fit, parts = needed("65B")
    assert not fit and parts["weights"] > 130e9
    fit, parts = needed("65B", int8=True)
    assert fit and 65e9 < parts["weights"] < 66e9
    assert needed("65B", tensor_parallel=2, gpus=2)[0]
    assert needed("7B", n_kv_heads=8)[1]["KV cache"] == needed("7B")[1]["KV cache"] / 4


def test_memory_of_heads_of_a_width_of_their_own():
    """int8 weights are those of the quantised model; a layer keeps queries and attention's output
    as wide as all heads."""
    config = lx.LlamaConfig(**TINY, n_kv_heads=2, head_dim=20)
    plan = EstimateConfig(inference=True, int8=True, seq_len=16, batch_size=1)
    with torch.device("meta"):
        quantized = quantize_(lx.Llama(config, dtype=torch.bfloat16))
    tensors = quantized.state_dict().values()
    parts = memory(config, plan)
    assert parts["weights"] == sum(t.nbytes for t in tensors)
    assert parts["KV cache"] == 2 * 3 * 16 * 2 * 20 * 2
    assert parts["work space"] == 16 * (2 * (2 * 48 + 2 * 80 + 2 * 40 + 2 * 80) + 4 * 4)


def test_training_memory_is_the_sum_of_its_tensors():
    """One GPU against the sizes of a model's own tensors; then what divides what."""
    plan = EstimateConfig(preset="7B", dim=512, n_layers=4, n_heads=8, hidden_dim=1376,
                          vocab_size=1000, seq_len=128, batch_size=3)
    config = plan.model_config()
    with torch.device("meta"):
        llama = lx.Llama(config)
    size = sum(p.numel() * p.element_size() for p in llama.parameters())
    one = memory(config, plan)
    assert one["weights"] == one["gradients"] == size and one["optimizer state"] == 2 * size
    assert one["working copies"] == size / 2
    assert one["activations"] == 3 * 128 * 4 * (2 * (6 * 512 + 2 * 1376) + 4 * 8)
    checkpointed = memory(config, dataclasses.replace(plan, recompute=True))["activations"]
    assert checkpointed == 3 * 128 * (4 * 2 * 512 + one["activations"] / (3 * 128 * 4))
    lower = memory(config, dataclasses.replace(plan, weights="bf16", gradients="bf16",
                                               optimizer_state="bf16"))
    assert lower["weights"] == lower["gradients"] == lower["optimizer state"] / 2 == size / 2
    assert lower["working copies"] == 0
    eight = memory(config, dataclasses.replace(plan, gpus=8))
    assert eight["weights"] == size / 8 and eight["activations"] == one["activations"]
    layer = sum(p.numel() for p in llama.layers[0].parameters())
    ends = 2 * 1000 * 512 + 512
    assert eight["working copies"] == 2 * (2 * layer + ends) + 2 * (layer + ends)
    split = memory(config, dataclasses.replace(plan, gpus=8, tensor_parallel=4))
    assert split["weights"] == size / 8 and split["activations"] == one["activations"] / 4
    assert split["working copies"] == eight["working copies"] / 4


@pytest.mark.parametrize("more", [{}, {"n_kv_heads": 2}])
def test_activations_are_the_bytes_that_blocks_keep(more):
    plan = EstimateConfig(preset="tiny", dim=48, n_layers=3, n_heads=4, hidden_dim=80, seq_len=16,
                          batch_size=2, **more)
    config = plan.model_config()
    block = lx.Llama(config).layers[1].bfloat16()
    inputs = [torch.randn(2, 16, 48, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    kept = kept_bytes(block_function, block, inputs)
    assert memory(config, plan)["activations"] == 3 * kept > 0
    recomputed = memory(config, dataclasses.replace(plan, recompute=True))["activations"]
    assert recomputed == 3 * sum(t.nbytes for t in inputs[:1]) + kept


@pytest.mark.parametrize("options, change", [
    ({"preset": "7B", "gpus": 8, "batch_size": 16}, "--batch-size 8"),
    ({"preset": "65B", "gpus": 64}, None),
    ({"preset": "65B", "gpus": 16, "batch_size": 8}, "--recompute --batch-size 1"),
    ({"preset": "7B"}, "--gpus 2"),
    ({"preset": "65B", "inference": True}, "--int8"),
    ({"preset": "65B", "inference": True, "int8": True, "batch_size": 16}, "--batch-size 2"),
    ({"preset": "65B", "inference": True, "gpu_memory": 24.0},
     "--gpus 4 --tensor-parallel 4 --int8"),
    ({"preset": "65B", "gpu_memory": 1.0}, "no smaller batch and no more GPUs make it fit")])
def test_what_to_change(options, change):
    plan = EstimateConfig(**options)
    text, sentence = report(plan)
    if change is None:
        assert sentence is None and text.endswith("it fits")
        return
    assert sentence.endswith(change) and sentence.startswith("estimate: expected at most ")
    new = fitting_plan(plan.model_config(), plan)
    assert ("no smaller" in change) == (new is None)
    if new:
        assert fits(new.model_config(), new) and not fits(plan.model_config(), plan)


def test_options_of_the_plan():
    config = EstimateConfig(preset="7B").model_config()
    a100 = estimate.speed(config, EstimateConfig(preset="7B"))
    assert estimate.speed(config, EstimateConfig(gpu="H100-80GB")) == a100 * 989 / 312
    assert estimate.speed(config, EstimateConfig(peak_flops=156e12)) == a100 / 2
    assert estimate.speed(config, EstimateConfig(mfu=0.97)) == pytest.approx(2 * a100)
    assert estimate.speed(config, EstimateConfig(recompute=True)) < 0.77 * a100
    assert EstimateConfig(gpu="H200-141GB").gpu_bytes() == 141e9
    assert EstimateConfig(preset="7B", dim=2048).total_tokens(config) == 20 * num_parameters(config)
    assert EstimateConfig(preset="7B", tokens=5).total_tokens(config) == 5
    assert EstimateConfig(preset="tiny").seq_len == 256


@pytest.mark.parametrize("options, message", [
    ({"gpus": 0}, "gpus: expected at least 1, got 0"),
    ({"gpus": 3, "tensor_parallel": 2}, "gpus: expected a multiple of tensor_parallel = 2, got 3"),
    ({"gpus": 3, "tensor_parallel": 3}, "tensor_parallel: expected a divisor of n_heads 32"),
    ({"mfu": 1.5}, "mfu: expected above 0 and at most 1, got 1.5"),
    ({"int8": True}, "int8: expected inference beside it, got True"),
    ({"inference": True, "recompute": True}, "recompute: expected none for inference"),
    ({"gpu": "T4"}, "gpu: expected A100-40GB, .*, got 'T4'"),
    ({"gpu_memory": math.inf}, "gpu_memory: expected a finite number above 0, got inf"),
    ({"weights": "fp8"}, "weights: expected fp32 or bf16, got 'fp8'"),
    ({"dim": 100}, "LlamaConfig: dim: expected a multiple of 2 \\* n_heads = 64, got 100")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EstimateConfig(**options)


def test_the_command(capsys):
    assert cli.main(["estimate", "--preset=65B", "--gpus=2048", "--tokens=1.4T"]) == 0
    text = capsys.readouterr().out
    assert "parameters           65,285,660,672\n" in text and "it fits" in text
    assert cli.main(["estimate", "--preset=65B", "--inference"]) == 1
    out, err = capsys.readouterr()
    assert "total" in out and err.count("\n") == 1 and err.endswith("with --int8\n")
    assert cli.main(["estimate", "--mfu=2"]) == 2
    assert capsys.readouterr().err == (
        "llama-ext: estimate: mfu: expected above 0 and at most 1, got 2.0\n")


def test_it_needs_torch_only():
    script = ("import sys\nfor name in ('numpy', 'tqdm', 'safetensors'): sys.modules[name] = None\n"
              "from llama_ext import cli\nsys.exit(cli.main(['estimate', '--preset', 'tiny']))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "it fits" in done.stdout, done.stderr


def test_quantities():
    assert tokens("4M") == 4 * 1024**2 and tokens("64k") == 65536 and tokens("100") == 100
    assert tokens("0.5M") == 512 * 1024
    assert count("1.4T") == 14 * 10**11 and count("2G") == 2 * 10**9 and rate("312T") == 312e12
    assert rate("1e12") == 1e12 and count("1.1T") == 11 * 10**11
    for text in ("", "M", "4m", "4MM", "nan", "inf", "many"):
        with pytest.raises(Exception, match="expected a finite number, .*got "):
            count(text)
    with pytest.raises(Exception, match="expected a whole number, got '0.3'"):
        tokens("0.3")
