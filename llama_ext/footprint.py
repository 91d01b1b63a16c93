"""What memory generation takes, known before any weights are read.

N tokens in one pass, R rows at work, C width, F hidden width, V vocabulary.
"""

from pathlib import Path

import torch

from .errors import LlamaExtError
from .generate import PROMPT_TOKENS


def footprint(model, dtype, prompt_lengths, max_new_tokens, batch_size):
    """{"weights", "cache", "workspace"}: bytes that `generate` takes for a model in `dtype`, which
    may still be on the meta device.

    weights, tables of the rotary embedding included, and the key/value cache are what is allocated;
    workspace bounds what a pass has allocated at a time: the layer's activations at the product
    of SwiGLU or behind attention, or the logits and what sampling makes of them.
    """
    config, item = model.config, dtype.itemsize
    room = sorted(((n, min(max_new_tokens, config.max_seq_len - n)) for n in prompt_lengths
                   if min(max_new_tokens, config.max_seq_len - n) > 0), reverse=True)
    rows, longest = min(batch_size, len(room)), max((n for n, _ in room), default=0)
    length = max((n + new for n, new in room), default=0)
    tokens = min(sum(n for n, _ in room[:rows]), max(PROMPT_TOKENS, longest) + rows)  # N
    parameters = sum(p.numel() * (item if p.is_floating_point() else p.itemsize)
                     for p in model.parameters())
    # Tables of the rotary embedding, and int8 weights.
    buffers = sum(buffer.nbytes for name, buffer in model.named_buffers()
                  if name.endswith(("rotary.cos", "rotary.sin", ".weight", ".scale")))
    # Per token: the stream before and behind both additions (4 C), then gate, up and their product,
    # or queries and keys before and behind rotation, values, and the output; log-sum-exp, positions
    # and the rotation's angles (fp32) too. A product of 16-bit matrices on a CPU may keep its sums
    # in fp32 beside its result.
    sums = 0 if item >= 4 else 4 * config.hidden_dim
    widest = max(3 * item * config.hidden_dim, 2 * item * config.hidden_dim + sums,
                 item * (2 * config.q_dim + 4 * config.kv_dim))
    layer = 4 * item * config.dim + widest + 8 * config.n_heads + 4 * config.head_dim + 32
    # Per logit: itself, and what sample() makes of it, sorting included.
    sampling = rows * config.vocab_size * (item + 48) + 3 * tokens * config.dim * item
    return {"weights": parameters + buffers,
            "cache": 2 * config.n_layers * rows * length * config.kv_dim * item,
            "workspace": max(tokens * layer, sampling)}


def free_memory(device):
    """Bytes that can still be allocated on `device`, as the driver or the operating system says;
    None where neither does."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        limits.append(_entries("/proc/meminfo")["MemAvailable:"] << 10)
        group = "/sys/fs/cgroup/memory"
        limit, used = (int(Path(f"{group}.{name}").read_text()) for name in ("max", "current"))
        cached = _entries(f"{group}.stat")  # files, which make room when it is needed
        limits.append(limit - used + cached["inactive_file"] + cached["active_file"])
    except (OSError, ValueError, KeyError):  # not Linux; no control group, or its limit is "max"
        pass
    return min(limits, default=None)


def _entries(path):
    """{name: number} of a file of lines "name number ..."."""
    return {line.split()[0]: int(line.split()[1]) for line in Path(path).read_text().splitlines()}


def describe(needed):
    """"weights 26.03 GB, cache 0.84 GB, workspace 0.13 GB: 27.00 GB" of footprint()'s dict."""
    def text(size):
        return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
    parts = ", ".join(f"{name} {text(size)}" for name, size in needed.items())
    return f"{parts}: {text(sum(needed.values()))}"


def require(needed, device):
    """Raises LlamaExtError when footprint()'s bytes exceed the memory that is free on `device`."""
    free = free_memory(device)
    if free is not None and sum(needed.values()) > free:
        raise LlamaExtError(f"generate: expected a model and batch that fit into the "
                            f"{free / 1e9:.2f} GB free on {device}, got {describe(needed)}")
