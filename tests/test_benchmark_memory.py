"""The table of `python -m benchmarks memory`."""

import torch

from benchmarks import memory
from llama_ext.model import LlamaConfig


def test_block_keeps_least_and_recomputes_no_product():
    config = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=1, hidden_dim=96,
                         max_seq_len=24)
    table = memory.measure(config, batch=2, tokens=24, dtype=torch.bfloat16, rounds=1)
    kept = {name: row[0] for name, row in table.items()}
    products = {name: row[1] for name, row in table.items()}
    kv = 2 * 2 * 16
    assert kept["llama_ext, block"] == 2 * (4 * 64 + kv + 2 * 96) + 4 * 4
    assert kept["... checkpointed"] == 2 * 2 * 64  # x and residual
    assert kept["llama_ext, block"] < kept["llama_ext, ops"] < kept["torch, SDPA"]
    assert products == {**dict.fromkeys(memory.VARIANTS, 3), "... checkpointed": 4}
    assert all(seconds > 0 for _, _, seconds in table.values())
