"""Weights of a LLaMA on disk, in any of three formats, read one tensor at a time.

    ours    a checkpoint folder, or the newest one of a run's (checkpoint.py)
    hf      config.json, and model.safetensors or pytorch_model.bin, whole or in parts with an index
    meta    params.json and consolidated.NN.pth, one per model-parallel rank

All are seen under our names, which are Meta's. Hugging Face's differ in name and in the rows of wq
and wk: there the two numbers of a rotated pair are half a head apart, here beside each other.
"""

import collections
import dataclasses
import functools
import json
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import checkpoint
from .errors import LlamaExtError
from .files import read_json
from .model import Llama, LlamaConfig

Entry = collections.namedtuple("Entry", "shape dtype read")  # read() -> the tensor
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_HF_LAYER = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
_HF_TOP = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_META_ROPE = {"rope_type": "llama3", "low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": 8192}  # constants in Meta's code


@dataclasses.dataclass
class Weights:
    """A model's weights. tensors: our name -> Entry; tokenizer: folder that may hold its files."""

    path: Path
    format: str
    config: LlamaConfig
    tensors: dict
    tokenizer: Path


def hf_name(name):
    """Hugging Face's name of our parameter `name`."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{_HF_LAYER[rest.removesuffix('.weight')]}.weight"
    return f"{_HF_TOP[name.removesuffix('.weight')]}.weight"


def is_rotated(name):
    return name.endswith(("attention.wq.weight", "attention.wk.weight"))


def to_half(weight, head_dim):
    """Rows of wq or wk, (heads * head_dim, C), from pairs (2i, 2i+1) to (i, i + head_dim/2)."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_interleaved(weight, head_dim):
    """The inverse of to_half."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def expected_shapes(config):
    """{our name: shape} of the parameters of a model of `config`."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}


def open_weights(path):
    """The Weights under `path`, whichever of the formats they are in; every name and shape checked.

    Raises LlamaExtError for what is missing, damaged or not a LLaMA.
    """
    path = Path(path)
    if not path.is_dir():
        raise LlamaExtError(f"{path}: expected a folder with a model, got none")
    if (path / "params.json").is_file():
        weights = _open_meta(path)
    elif {"model_type", "architectures"} & set(read_json(path / "config.json", missing={})):
        weights = _open_hf(path)
    else:
        weights = _open_ours(path)
    _check(weights)
    return weights


def _check(weights):
    def listed(names):
        names = sorted(names)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    path, expected = weights.path, expected_shapes(weights.config)
    naming = hf_name if weights.format == "hf" else str
    if missing := expected.keys() - weights.tensors.keys():
        raise LlamaExtError(f"{path}: expected {len(expected)} tensors, missing are "
                            f"{listed(map(naming, missing))}")
    for name, shape in expected.items():
        entry = weights.tensors[name]
        if tuple(entry.shape) != shape:
            raise LlamaExtError(f"{path}: {naming(name)}: expected shape {shape}, "
                                f"got {tuple(entry.shape)}")
        if entry.dtype not in FLOATS:
            raise LlamaExtError(f"{path}: {naming(name)}: expected float32, bfloat16, float16 or "
                                f"float64, got {str(entry.dtype).removeprefix('torch.')}")
    if extra := weights.tensors.keys() - expected.keys():
        raise LlamaExtError(f"{path}: expected the tensors of a LLaMA, also got {listed(extra)}")
    weights.tensors = {name: weights.tensors[name] for name in expected}  # one order for all


def _config(file, fields):
    try:
        return LlamaConfig(**fields)
    except (TypeError, ValueError) as error:
        raise LlamaExtError(f"{file}: {error}") from None


# --- files of tensors ---

def _safetensors(file):
    """{name: Entry} of a safetensors file; its data stay on disk until read."""
    try:
        handle = safe_open(file, "pt")
        entries = {}
        for name in handle.keys():
            view = handle.get_slice(name)
            entries[name] = Entry(tuple(view.get_shape()), _DTYPES.get(view.get_dtype(), "other"),
                                  functools.partial(handle.get_tensor, name))
    except (OSError, SafetensorError) as error:
        raise LlamaExtError(f"{file} cannot be read: {error}") from None
    return entries


def _pickled(file):
    """{name: Entry} of a file of torch.save, mapped into memory; it may hold nothing but data."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise LlamaExtError(f"{file}: expected tensors only, got other Python objects, which may "
                            "run code") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise LlamaExtError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise LlamaExtError(f"{file}: expected a dict of tensors, got something else")
    return {name: Entry(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
           "BF16": torch.bfloat16}


# --- ours ---

def _open_ours(path):
    step = checkpoint.find(path)
    checkpoint.read_state(step)
    file = step / "config.json"
    config = _config(file, read_json(file))
    if (step / "model.safetensors").is_file():
        tensors = _safetensors(step / "model.safetensors")
    else:  # the shards of several processes
        tensors = {name: Entry(shape, torch.float32, functools.partial(_read_stored, step, name))
                   for name, shape in checkpoint.shapes(step).items()}
    return Weights(step, "ours", config, tensors, step)


def _read_stored(step, name):
    tensor = torch.empty(checkpoint.shapes(step)[name])
    checkpoint.read(step, {name: tensor})
    return tensor


# --- Hugging Face ---

def _open_hf(path):
    config = hf_config(path / "config.json")
    theirs = _hf_entries(path)
    ours = {}
    names = {hf_name(name): name for name in
             expected_shapes(dataclasses.replace(config, tie_embeddings=False))}
    for name, entry in theirs.items():
        if name.endswith("rotary_emb.inv_freq") or (
                name == "lm_head.weight" and config.tie_embeddings):
            continue  # a buffer of old versions; the embedding table once more
        mine = names.get(name, name)
        if is_rotated(mine):
            entry = entry._replace(
                read=lambda read=entry.read: to_interleaved(read(), config.head_dim))
        ours[mine] = entry
    return Weights(path, "hf", config, ours, path)


def _hf_entries(path):
    for single, load in (("model.safetensors", _safetensors), ("pytorch_model.bin", _pickled)):
        if (path / single).is_file():
            return load(path / single)
        index = path / f"{single}.index.json"
        if not index.is_file():
            continue
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(f, str) for f in where.values()):
            raise LlamaExtError(f"{index}: expected a weight_map of names to files")
        parts = {file: load(path / Path(file).name) for file in sorted(set(where.values()))}
        for name, file in where.items():
            if name not in parts[file]:
                raise LlamaExtError(f"{path / file}: expected the tensor {name} that "
                                    f"{index.name} names, got a file without it")
        return {name: entry for part in parts.values() for name, entry in part.items()}
    raise LlamaExtError(f"{path}: expected model.safetensors or pytorch_model.bin, whole or in "
                        "parts with an index, found neither")


def hf_config(file):
    """The LlamaConfig of a Hugging Face config.json, old (rope_scaling) or new (rope_parameters).

    Raises LlamaExtError for what is not a LLaMA of ours: another architecture, activation, biases.
    """
    theirs = read_json(file)
    for name, wanted in (("architectures", (None, ["LlamaForCausalLM"])),
                         ("model_type", ("llama",)), ("hidden_act", (None, "silu")),
                         ("attention_bias", (None, False)), ("mlp_bias", (None, False))):
        if theirs.get(name) not in wanted:
            raise LlamaExtError(f"{file}: {name}: expected {json.dumps(wanted[-1])}, "
                                f"got {json.dumps(theirs[name] if name in theirs else None)}")
    ours = {"dim": "hidden_size", "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads", "vocab_size": "vocab_size",
            "hidden_dim": "intermediate_size"}
    if missing := [name for name in ours.values() if name not in theirs]:
        raise LlamaExtError(f"{file}: expected the field {missing[0]}, found none")
    rope = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", theirs.get("rope_theta", 10000.0))
    return _config(file, {
        **{mine: theirs[name] for mine, name in ours.items()},
        "n_kv_heads": theirs.get("num_key_value_heads"), "head_dim": theirs.get("head_dim"),
        "rope_theta": theta,
        "max_seq_len": theirs.get("max_position_embeddings", 2048),
        "norm_eps": theirs.get("rms_norm_eps", 1e-6), "rope_scaling": rope or None,
        "tie_embeddings": theirs.get("tie_word_embeddings", False)})


def to_hf_config(config, dtype):
    """The content of config.json, for transformers 4 and 5. dtype: a torch.dtype."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False,
        "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling, "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": name, "bos_token_id": 1, "eos_token_id": 2}


# --- Meta ---

def _open_meta(path):
    files = {int(match[1]): file for file in sorted(path.iterdir())
             if (match := re.fullmatch(r"consolidated\.(\d+)\.pth", file.name))}
    numbers = sorted(files)
    if not files:
        raise LlamaExtError(f"{path}: expected consolidated.00.pth, found none")
    if numbers != list(range(len(files))):
        raise LlamaExtError(f"{path}: expected consolidated.00.pth and on without a gap, "
                            f"got the numbers {', '.join(map(str, numbers))}")
    parts = [(files[number], _pickled(files[number])) for number in numbers]
    names = [name for name in parts[0][1] if name != "rope.freqs"]  # a buffer of Llama 1 and 2
    for file, entries in parts:
        if different := set(names) ^ (entries.keys() - {"rope.freqs"}):
            raise LlamaExtError(f"{file}: expected the same tensors as {parts[0][0].name}, "
                                f"but {sorted(different)[0]} is only in one of them")
    file = path / "params.json"
    params = read_json(file)
    if not isinstance(params.get("dim"), int):
        raise LlamaExtError(f"{file}: dim: expected an int, got {params.get('dim')!r}")
    tensors = {name: _joined(file, name, [e[name] for _, e in parts], params["dim"])
               for name in names}
    first = {name: entry.read().data_ptr() for name, entry in parts[0][1].items()
             if name in ("output.weight", "tok_embeddings.weight")}
    config = _meta_config(file, params, tensors, tied=len(set(first.values())) == 1)
    if config.tie_embeddings:
        tensors.pop("output.weight", None)
    # Llama 1 and 2 came with one tokenizer.model for all sizes, in the folder above.
    above = (path.absolute().parent / "tokenizer.model").is_file()
    own = (path / "tokenizer.model").is_file() or not above
    return Weights(path, "meta", config, tensors, path if own else path.absolute().parent)


def _joined(file, name, parts, dim):
    """One Entry of the parts of a tensor that model-parallel ranks hold."""
    shape = parts[0].shape
    if len(shape) < 2 or len(parts) == 1:
        return parts[0]
    if name == "tok_embeddings.weight":
        axis = int(shape[1] != dim)  # Llama 3 splits the vocabulary, 1 and 2 the width
    else:
        axis = int(name.endswith(("wo.weight", "w2.weight")))
    for part in parts:
        if part.dtype != parts[0].dtype or part.shape[1 - axis] != shape[1 - axis]:
            raise LlamaExtError(f"{file.parent}: {name}: expected parts of one dtype, and of one "
                                f"shape but in dimension {axis}, got {shape} and {part.shape}")
    full = list(shape)
    full[axis] = sum(part.shape[axis] for part in parts)
    return Entry(tuple(full), parts[0].dtype,
                 lambda: torch.cat([part.read() for part in parts], axis))


def _meta_config(file, params, tensors, tied):
    """params.json leaves the vocabulary, the feed-forward width and the context to others."""
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in tensors:
            raise LlamaExtError(f"{file.parent}: expected the tensor {name}, found none")
    for name in ("n_layers", "n_heads"):
        if name not in params:
            raise LlamaExtError(f"{file}: expected the field {name}, found none")
    theta, scaling = params.get("rope_theta", 10000.0), None
    eps, scaled = params.get("norm_eps", 1e-5), params.get("use_scaled_rope", False)
    if scaled:  # Llama 3.1 has the factor 8; 3.2, whose models are smaller, 32
        factor = params.get("rope_scaling_factor", 8.0 if params["dim"] >= 4096 else 32.0)
        scaling = {**_META_ROPE, "factor": factor}
    context = 131072 if scaled else 8192 if theta == 500000.0 else 4096 if eps == 1e-5 else 2048
    return _config(file, {
        "dim": params["dim"], "n_layers": params["n_layers"], "n_heads": params["n_heads"],
        "n_kv_heads": params.get("n_kv_heads"),
        "vocab_size": tensors["tok_embeddings.weight"].shape[0],
        "hidden_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "multiple_of": params.get("multiple_of", 256), "norm_eps": eps, "rope_theta": theta,
        "max_seq_len": params.get("max_seq_len", context), "rope_scaling": scaling,
        "tie_embeddings": tied})


def to_meta_params(config):
    """The content of params.json. Raises LlamaExtError for a rope scaling or head_dim that Meta's
    code lacks."""
    if config.q_dim != config.dim:
        raise LlamaExtError(f"head_dim: expected dim / n_heads = {config.dim / config.n_heads:g}, "
                            f"all that Meta's format can say, got {config.head_dim}")
    scaling = config.rope_scaling
    if scaling and {**scaling, "factor": 0} != {**_META_ROPE, "factor": 0}:
        raise LlamaExtError(f"rope_scaling: expected {_META_ROPE} with any factor, all that Meta's "
                            f"format can say, got {scaling}")
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
              "n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size,
              "multiple_of": config.multiple_of, "norm_eps": config.norm_eps,
              "rope_theta": config.rope_theta, "max_seq_len": config.max_seq_len}
    if config.hidden_dim != dataclasses.replace(config, hidden_dim=None).hidden_dim:
        # Meta's code: int(multiplier * int(8 * dim / 3)), rounded up to a multiple
        params["multiple_of"] = 1
        params["ffn_dim_multiplier"] = (config.hidden_dim + 0.5) / (8 * config.dim // 3)
    if scaling:
        params.update(use_scaled_rope=True, rope_scaling_factor=scaling["factor"])
    return params
