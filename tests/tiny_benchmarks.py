"""Benchmarks small enough for tests: fixtures and a result made by hand."""

import pytest

from benchmarks import models, result, timing


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Limits that are measured in a millisecond, a model of two narrow layers."""
    monkeypatch.setattr(timing, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(timing, "MATMUL", {"cpu": (16, 32, 1)})
    monkeypatch.setattr(models, "SMALL", {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
                                          "vocab_size": 53, "hidden_dim": 48, "max_seq_len": 64})


def row(op="rmsnorm", shape="8 x 16", dtype="fp32", direction="forward", seconds=1e-3, ideal=5e-4,
        peers=(), **rest):
    """A row in which ours takes `seconds`, and each of peers {name: seconds} its own."""
    times = {result.OURS: seconds, **dict(peers)}
    return {"op": op, "shape": shape, "dtype": dtype, "direction": direction, "unit": "B",
            "work": 1e6, "limit": "copy", "limit_rate": 1e6 / ideal, "left_out": {}, "wrong": {},
            "providers": {name: result.entry([s], 1e6, ideal) for name, s in times.items()}, **rest}


def about(**changes):
    return {**result.machine("cpu", 2), **changes}
