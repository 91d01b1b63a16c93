"""`llama-ext convert`: a model's weights from one format into another, tensor by tensor.

Besides one tensor nothing of the model is ever in memory: inputs are mapped files, outputs are
written as they come. The output folder appears under its name once it is complete and durable.
"""

import json
import mmap
import os
import re
import shutil
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from . import checkpoint
from .errors import LlamaExtError
from .files import fsync_folder, seal
from .formats import (FLOATS, hf_name, is_rotated, open_weights, to_half, to_hf_config,
                      to_meta_params)
from .release_tokenizers import FILES, check_fits, load_tokenizer

FORMATS = ("hf", "meta", "ours")
_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_UNITS = {"": 1, "K": 10 ** 3, "M": 10 ** 6, "G": 10 ** 9}


def parse_dtype(dtype):
    """The torch.dtype that `dtype` (itself, its name, or None for None) means."""
    if dtype is None or dtype in FLOATS:
        return dtype
    names = {str(d).removeprefix("torch."): d for d in FLOATS}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    return names[dtype]


def parse_size(size):
    """Bytes, of an int or a text like "5GB" or "300MB" (powers of ten)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]?)B?", str(size).upper())
    if not match or int(match[1]) == 0:
        raise ValueError(f"shard_size: expected a size like 5GB, got {size!r}")
    return int(match[1]) * _UNITS[match[2]]


def convert(path, out, to, dtype=None, shard_size="5GB"):
    """Write the model in the folder `path` (any format) as the new folder `out`.

    to: "hf", "meta" or "ours". dtype: of the output, a torch.dtype or its name; None keeps each
    tensor's. shard_size: bytes in a file of "hf" at most (one tensor at least), an int or a text
    like "5GB"; "meta" and "ours" have one file. Without dtype the values are the same bits, and
    there and back gives the same. Returns a sentence on what `llama-ext generate` lacks, or None.
    Raises ValueError for wrong options, LlamaExtError for a model that is damaged, no LLaMA or not
    expressible in the format, an `out` that exists and a full disk; `out` is then not there.
    """
    if to not in FORMATS:
        raise ValueError(f"convert: to: expected one of {', '.join(FORMATS)}, got {to!r}")
    parse_dtype(dtype), parse_size(shard_size), check_free(out)
    return write(open_weights(path), out, to, dtype, shard_size)


def check_free(out):
    """Raises LlamaExtError when `out` exists or there is no folder to put it into."""
    out = Path(out)
    if os.path.lexists(out):
        raise LlamaExtError(f"{out}: expected a new folder's name, but it exists")
    if not out.absolute().parent.is_dir():
        raise LlamaExtError(f"{out.absolute().parent}: expected a folder to write into, got none")


def write(weights, out, to, dtype=None, shard_size="5GB"):
    """Write formats.Weights as the new folder `out`; the rest as `convert`."""
    out, dtype = Path(out), parse_dtype(dtype)
    entries = {name: entry._replace(dtype=dtype or entry.dtype)
               for name, entry in weights.tensors.items()}
    tokenizer, beside, extra, lacks = _tokenizer(weights, to)
    write_tensors, config = {
        "hf": (_write_hf, lambda: to_hf_config(weights.config,
                                               entries["tok_embeddings.weight"].dtype)),
        "meta": (_write_meta, lambda: to_meta_params(weights.config)),
        "ours": (_write_ours, weights.config.to_dict)}[to]
    config = config()
    check_free(out)
    temp = out.absolute().parent / f".{out.name}.tmp"  # one name: a killed run's is replaced
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        for file in tokenizer:
            shutil.copyfile(file, temp / file.name)
        for name, content in beside.items():
            _write_json(temp / name, content)
        _write_json(temp / ("params.json" if to == "meta" else "config.json"), {**config, **extra})
        write_tensors(temp, weights.config, entries, parse_size(shard_size))
        for file in temp.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        fsync_folder(temp)
        temp.rename(out)
        fsync_folder(temp.parent)
    except OSError as error:
        raise LlamaExtError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return lacks


def _tokenizer(weights, to):
    """(files to copy, {name: JSON object} to write beside them, special ids for config.json, what
    generation lacks) of the tokenizer beside the weights. Raises LlamaExtError when it has more ids
    than the model has embeddings."""
    folder = weights.tokenizer
    files = {name: folder / name for name in FILES if folder and (folder / name).is_file()}
    if not {"tokenizer.model", "tokenizer.json"} & files.keys():
        return files.values(), {}, {}, ("generate needs tokenizer.model or tokenizer.json, and "
                                        "neither is beside the weights")
    try:
        tokenizer = load_tokenizer(folder)
    except LlamaExtError as error:
        return files.values(), {}, {}, f"generate cannot use the tokenizer: {error}"
    check_fits(folder, tokenizer, weights.config.vocab_size)
    eos = list(tokenizer.eos_ids)
    special = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos if eos[1:] else eos[0]}
    beside = {"generation_config.json": special, **(tokenizer.hf_files() if to == "hf" else {})}
    return (files.values(), {name: beside[name] for name in beside.keys() - files.keys()},
            special if to == "hf" else {}, None)


# --- the formats ---

def _write_hf(folder, config, entries, shard_size):
    shards = [{}]
    for name, entry in entries.items():
        if is_rotated(name):
            entry = entry._replace(read=lambda read=entry.read: to_half(read(), config.head_dim))
        size = _nbytes(entry)
        if shards[-1] and size + sum(map(_nbytes, shards[-1].values())) > shard_size:
            shards.append({})
        shards[-1][hf_name(name)] = entry
    count = len(shards)
    names = ["model.safetensors"] if count == 1 else [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(names, shards):
        write_safetensors(folder / file, shard)
    if count > 1:
        _write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(map(_nbytes, entries.values()))},
            "weight_map": {name: file for file, shard in zip(names, shards) for name in shard}})


def _write_ours(folder, config, entries, shard_size):
    write_safetensors(folder / "model.safetensors", entries)
    files = {p.name: checkpoint._fingerprint(p) for p in sorted(folder.iterdir())}
    (folder / "state.json").write_bytes(seal({"step": 0, "state": {}, "files": files}))


def _write_meta(folder, config, entries, shard_size):
    """torch.save of the layout alone; the tensors go one by one into the file, mapped."""
    file = folder / "consolidated.00.pth"
    with FakeTensorMode():
        layout = {name: torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
                  for name, entry in entries.items()}
        if config.tie_embeddings:  # Meta's code wants both; the file holds them once
            layout["output.weight"] = layout["tok_embeddings.weight"]
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(layout, file)
    with open(file, "r+b") as f:  # a full disk shows here, not as a signal at a mapped page
        os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(file, weights_only=True, mmap=True)
    for name, entry in entries.items():
        mapped[name].copy_(entry.read())


def write_safetensors(file, entries):
    """Write {name: Entry} as a safetensors file, reading, casting and writing one at a time."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, entry in entries.items():
        end = offset + _nbytes(entry)
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape),
                        "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            tensor = entry.read().detach().to("cpu", entry.dtype).contiguous()
            f.write(tensor.view(torch.uint8).numpy())


def _nbytes(entry):
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize


def _write_json(file, content):
    file.write_text(json.dumps(content, indent=1) + "\n")
