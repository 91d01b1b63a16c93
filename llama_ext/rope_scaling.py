"""RoPE frequencies, and their scaling for contexts longer than a model was first trained for."""

import math

import torch

_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}


def check_rope_scaling(scaling):
    """`scaling` with plain "rope_type" and numbers, or None where it changes nothing.

    scaling: None or a dict as in a Hugging Face config: "rope_type" (or its old name "type"), one
    of "default", "linear" and "llama3", and that type's numbers. Raises ValueError, one sentence,
    for other types, fields and values.
    """
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling: expected a dict or None, got {scaling!r}")
    fields = dict(scaling)
    old_name = fields.pop("type", None)
    kind = fields.pop("rope_type", old_name)
    if kind not in _FIELDS:
        raise ValueError(f"rope_scaling: rope_type: expected one of {', '.join(_FIELDS)}, "
                         f"got {kind!r}")
    wanted = _FIELDS[kind]
    if sorted(fields) != sorted(wanted):
        raise ValueError(f"rope_scaling: {kind}: expected the fields "
                         f"{', '.join(wanted) or 'none'}, "
                         f"got {', '.join(sorted(map(str, fields))) or 'none'}")
    for name, value in fields.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling: {name}: expected a number > 0, got {value!r}")
    if kind == "llama3" and fields["low_freq_factor"] >= fields["high_freq_factor"]:
        raise ValueError("rope_scaling: high_freq_factor: expected more than low_freq_factor "
                         f"{fields['low_freq_factor']}, got {fields['high_freq_factor']}")
    return {"rope_type": kind, **fields} if wanted else None


def rope_frequencies(head_dim, theta, scaling=None):
    """Radians per position of each pair, (head_dim / 2,), fp64 (arXiv 2104.09864, eq. 15).

    scaling, as check_rope_scaling returns it: "linear" divides all by factor (arXiv 2306.15595);
    "llama3" divides those that turn less than low_freq_factor times within
    original_max_position_embeddings, keeps those that turn more than high_freq_factor times, and
    goes from one to the other linearly in the number of turns between (Llama 3.1, arXiv
    2407.21783).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    frequency = theta ** (-exponent / head_dim)
    if scaling is None:
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)
