"""Scaled RoPE frequencies against transformers' and Meta's definition."""

import math
import re

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_ext import LlamaConfig
from llama_ext.layers import RotaryEmbedding
from llama_ext.rope_scaling import check_rope_scaling, rope_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
LINEAR = {"rope_type": "linear", "factor": 2.5}


@pytest.mark.parametrize("scaling", [LLAMA3, {**LLAMA3, "factor": 32.0}, LINEAR],
                         ids=["llama3", "llama3 by 32", "linear"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equals_transformers(scaling, head_dim):
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **scaling})
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    ours = rope_frequencies(head_dim, 500000.0, scaling)
    assert ours.dtype == torch.float64 and factor == 1.0
    # transformers rounds each of its steps to fp32: eight roundings at most.
    assert ((ours - theirs.double()).abs() <= 8 * 2 ** -24 * ours).all()
    plain = rope_frequencies(head_dim, 500000.0)
    assert not torch.allclose(ours, plain, rtol=1e-3)


def test_llama3_is_metas_rule_for_each_frequency():
    plain = rope_frequencies(128, 500000.0).tolist()
    seen = set()
    for got, f in zip(rope_frequencies(128, 500000.0, LLAMA3).tolist(), plain):
        wavelength = 2 * math.pi / f
        if wavelength < 8192 / 4:
            expected, band = f, "kept"
        elif wavelength > 8192 / 1:
            expected, band = f / 8, "divided"
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected, band = (1 - smooth) * f / 8 + smooth * f, "between"
        seen.add(band)
        assert got == pytest.approx(expected, rel=1e-14)
    assert seen == {"kept", "divided", "between"}


def test_module_and_config_use_it():
    rotary = RotaryEmbedding(64, 500000.0, 100, scaling=LLAMA3)
    angle = torch.outer(torch.arange(100.0).double(), rope_frequencies(64, 500000.0, LLAMA3))
    assert torch.equal(rotary.cos, angle.cos().float())
    assert torch.equal(rotary.sin, angle.sin().float())
    assert "llama3" in repr(rotary)
    config = LlamaConfig(dim=64, n_layers=1, n_heads=1, vocab_size=7, rope_scaling=LINEAR)
    assert LlamaConfig.from_dict(config.to_dict()) == config
    from llama_ext import Llama

    assert Llama(config).layers[0].attention.rotary.scaling == LINEAR


def test_default_and_old_spelling():
    assert check_rope_scaling(None) is None
    assert check_rope_scaling({"rope_type": "default"}) is None
    assert check_rope_scaling({"type": "linear", "factor": 2}) == {
        "rope_type": "linear", "factor": 2}
    assert LlamaConfig(rope_scaling={"rope_type": "default"}).rope_scaling is None
    assert check_rope_scaling(dict(LLAMA3)) == LLAMA3


@pytest.mark.parametrize("scaling, sentence", [
    ({"rope_type": "yarn", "factor": 2}, "rope_type: expected one of default, linear, llama3, "
                                         "got 'yarn'"),
    ({"factor": 2}, "rope_type: expected one of default, linear, llama3, got None"),
    ({"rope_type": "linear"}, "linear: expected the fields factor, got none"),
    ({**LINEAR, "beta": 1}, "linear: expected the fields factor, got beta, factor"),
    ({**LINEAR, "factor": 0}, "factor: expected a number > 0, got 0"),
    ({**LINEAR, "factor": "2"}, "factor: expected a number > 0, got '2'"),
    ({**LLAMA3, "low_freq_factor": 4.0}, "high_freq_factor: expected more than low_freq_factor "
                                         "4.0, got 4.0"),
    ("linear", "expected a dict or None, got 'linear'"),
])
def test_errors(scaling, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        RotaryEmbedding(64, scaling=scaling)
    with pytest.raises(ValueError, match="LlamaConfig: rope_scaling: "):
        LlamaConfig(rope_scaling=scaling)
