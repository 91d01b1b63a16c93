"""Training runs of a second, shared by the tests of the trainer: fixtures and what they leave."""

import json
import os

import pytest

from corpus import write_texts
from llama_ext.prepare import prepare
from llama_ext.train import TrainConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    write_texts(out / "texts")
    prepare([out / "texts"], out / "set", vocab_size=320, val_fraction=0.1, progress=False)
    return out / "set"


@pytest.fixture
def small(data, tmp_path):
    """Makes the TrainConfig of a run that takes a second."""
    def config(**options):
        return TrainConfig(**{"data": str(data), "run": str(tmp_path / "run"), "dim": 32,
                              "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "seq_len": 32,
                              "batch_size": 4, "steps": 6, "lr": 3e-3, "val_every": 4,
                              "save_every": 4, "dtype": "fp32", **options})
    return config


def has_logged(run, step):
    """Whether a run at work has logged this step; a line that it is just writing does not count."""
    path = os.path.join(run, "metrics.jsonl")
    return os.path.exists(path) and any(json.loads(line)["step"] >= step
                                        for line in open(path) if line.endswith("\n"))


def rows(run):
    """The metrics without the speeds and the memory, which no two runs share."""
    lines = [json.loads(line) for line in open(os.path.join(run, "metrics.jsonl"))]
    own = ("tokens_per_second", "mfu", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in own} for line in lines]
