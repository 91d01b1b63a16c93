"""The measurement of overlap: its arithmetic, and that prefetch makes the difference it shows."""

import pytest

from benchmarks.overlap import draw, length, measure, overlap, share, union
from llama_ext import LlamaConfig


def test_intervals():
    a = union([(5, 6), (0, 2), (1, 3), (6, 7)])
    assert a == [(0, 3), (5, 7)] and length(a) == 5
    assert overlap(a, [(2, 6)]) == 2 and overlap(a, []) == overlap(a, [(3, 5)]) == 0
    step = {"compute": a, "gather weights": [(2, 6)], "reduce gradients": [(8, 12)]}
    assert share([step]) == pytest.approx(2 / 8) and share([step], ("gather weights",)) == 0.5


def test_weights_are_gathered_while_something_computes_with_prefetch(tmp_path):
    config = LlamaConfig(dim=128, n_layers=4, n_heads=2, vocab_size=64, max_seq_len=128)
    results = measure(config, steps=2)
    kinds = ("gather weights",)
    assert share(results[True], kinds) > 1.5 * share(results[False], kinds)
    assert all(step["reduce gradients"] for steps in results.values() for step in steps)
    draw(tmp_path / "o.png", results)
    assert (tmp_path / "o.png").read_bytes()[:4] == b"\x89PNG"
