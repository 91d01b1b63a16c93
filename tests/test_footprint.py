"""What generation will take is what it takes: bytes measured by torch's profiler."""

import random

import pytest
import torch

from llama_ext.errors import LlamaExtError
from llama_ext.footprint import describe, footprint, free_memory, require
from llama_ext.generate import generate
from llama_ext.model import KVCache, Llama, LlamaConfig


def peak_bytes(model, prompts, new, **options):
    """The most bytes that generate() has allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        generate(model, prompts, new, **options)
    now = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("shape, dtype, temperature, least", [
    ({"dim": 64, "hidden_dim": 192, "vocab_size": 97}, torch.float32, 0, 0.75),
    ({"dim": 64, "hidden_dim": 192, "vocab_size": 97, "n_kv_heads": 2}, torch.bfloat16, 0, 0.65),
    ({"dim": 64, "hidden_dim": 32, "vocab_size": 97}, torch.float32, 0, 0.7),  # attention is most
    ({"dim": 64, "hidden_dim": 32, "vocab_size": 97, "head_dim": 40, "n_kv_heads": 2},
     torch.float32, 0, 0.65),
    ({"dim": 32, "hidden_dim": 32, "vocab_size": 5000}, torch.bfloat16, 1.0, 0.5)])  # logits are
@pytest.mark.parametrize("prompts, batch_size", [(1, 1), (3, 3), (20, 8)])
def test_footprint_bounds_what_is_allocated(shape, dtype, temperature, least, prompts, batch_size):
    least *= 1 if batch_size >= prompts else 0.6  # the longest prompts need not meet in one batch
    model = Llama(LlamaConfig(n_layers=2, n_heads=4, max_seq_len=256, **shape), dtype=dtype)
    prompts = [[1] * random.Random(i).randint(3, 200) for i in range(prompts)]
    needed = footprint(model, dtype, list(map(len, prompts)), 8, batch_size)
    with torch.device("meta"):
        assert footprint(Llama(model.config), dtype, map(len, prompts), 8, batch_size) == needed
    rotary = model.layers[0].attention.rotary
    assert needed["weights"] == sum(t.nbytes for t in (*model.parameters(), rotary.cos, rotary.sin))
    cache = KVCache(model.config, min(len(prompts), batch_size), max(map(len, prompts)) + 8, dtype)
    assert needed["cache"] == cache.k.nbytes + cache.v.nbytes
    taken = peak_bytes(model, prompts, 8, batch_size=batch_size, temperature=temperature, seed=0)
    assert least * needed["workspace"] < taken - needed["cache"] <= needed["workspace"]


def test_tied_and_full_contexts():
    model = Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=50, max_seq_len=16,
                              tie_embeddings=True))
    needed = footprint(model, torch.float32, [16, 12], 100, 5)
    assert needed["weights"] == 4 * (model.num_parameters() + 16 * 16)
    assert needed["cache"] == 2 * 1 * 1 * 16 * 32 * 4  # the first prompt gets no row
    assert footprint(model, torch.float32, [16], 5, 5)["cache"] == 0


def test_13b_in_bf16_fits_one_card_of_80_gb():
    with torch.device("meta"):
        model = Llama(LlamaConfig.preset("13B"))
    needed = footprint(model, torch.bfloat16, [1024] * 16, 1024, 16)
    assert needed["weights"] == 2 * 13_015_864_320 + 4 * 2048 * 128
    assert needed["cache"] == 2 * 40 * 16 * 2048 * 5120 * 2
    assert sum(needed.values()) < 80e9 < sum(footprint(model, torch.float32, [1024] * 16, 1024,
                                                       16).values())


def test_refusal(monkeypatch):
    device = torch.device("cpu")
    assert free_memory(device) > 1 << 20
    needed = {"weights": 26_030_000_000, "cache": 1_000_000_000, "workspace": 2_000_000}
    assert describe(needed) == "weights 26.03 GB, cache 1.00 GB, workspace 2.00 MB: 27.03 GB"
    monkeypatch.setattr("llama_ext.footprint.free_memory", lambda device: 27_032_000_000)
    require(needed, device)
    monkeypatch.setattr("llama_ext.footprint.free_memory", lambda device: 27_031_999_999)
    with pytest.raises(LlamaExtError, match="fit into the 27.03 GB free on cpu, got weights 26.03"):
        require(needed, device)
    monkeypatch.setattr("llama_ext.footprint.free_memory", lambda device: None)
    require(needed, device)
