"""The measurement of overlap: its arithmetic, and that prefetch makes the difference it shows."""

import pytest

from benchmarks.overlap import draw, intervals, length, overlap, record, share, union
from llama_ext import LlamaConfig


def test_intervals():
    a = union([(5, 6), (0, 2), (1, 3), (6, 7)])
    assert a == [(0, 3), (5, 7)] and length(a) == 5
    assert overlap(a, [(2, 6)]) == 2 and overlap(a, []) == overlap(a, [(3, 5)]) == 0
    step = {"compute": a, "gather weights": [(2, 6)], "reduce gradients": [(8, 12)]}
    assert share([step]) == pytest.approx(2 / 8) and share([step], ("gather weights",)) == 0.5


def test_weights_are_gathered_while_something_computes_with_prefetch(tmp_path):
    config = LlamaConfig(dim=128, n_layers=4, n_heads=2, vocab_size=64, max_seq_len=128)
    traces = record(config, steps=2)
    assert [gathered_ahead(step) for step in traces[True]] == 2 * [["1", "2", "3"]]
    assert [gathered_ahead(step) for step in traces[False]] == 2 * [[]]
    results = {prefetch: [intervals(step) for step in steps] for prefetch, steps in traces.items()}
    assert all(all(step.values()) for steps in results.values() for step in steps)
    draw(tmp_path / "o.png", results)
    assert (tmp_path / "o.png").read_bytes()[:4] == b"\x89PNG"


def gathered_ahead(events):
    """The blocks whose weights a forward asks for before it has finished computing without them.

    The order of the calls, not their times: those depend on what else the machine does.
    """
    ahead, asked = [], {}
    for event in sorted(events, key=lambda event: event["ts"]):
        if event["name"] == "FSDP::pre_backward":
            return ahead
        kind, _, block = event["name"].rstrip(")").partition(" (layers.")
        if kind == "FSDP::all_gather":
            asked[block] = False
        elif event["name"].startswith("llama_ext::"):
            asked = dict.fromkeys(asked, True)
        elif kind == "FSDP::all_gather_copy_out" and asked.pop(block):
            ahead.append(block)
    raise AssertionError("the trace has no backward")
