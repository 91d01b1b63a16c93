"""Hugging Face checkpoints as our model, and back: lx.hf.load, lx.hf.save."""

from pathlib import Path

import torch

from . import convert
from .formats import Entry, Weights, open_weights
from .model import Llama


def load(path, dtype=None, device="cpu"):
    """The Llama in the folder `path`: Hugging Face's (safetensors or .bin, whole or in parts),
    Meta's (params.json, consolidated.NN.pth) or ours.

    dtype: of the model, a torch.dtype or its name; None takes that of the embeddings. The weights
    are read one tensor at a time. Raises LlamaExtError, before the model is made, for what is
    missing, damaged or not a LLaMA: names, shapes, biases, another architecture or rope type.
    """
    dtype = convert.parse_dtype(dtype)
    weights = open_weights(path)
    dtype = dtype or weights.tensors["tok_embeddings.weight"].dtype
    with torch.device("meta"):
        model = Llama(weights.config, dtype=dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensors[name].read())
    return model


def save(model, path, dtype=None, shard_size="5GB", tokenizer=None):
    """Write the Llama `model` as a new Hugging Face folder, for transformers' from_pretrained.

    dtype, shard_size: as `convert`. tokenizer: a folder whose tokenizer files go along. Raises
    ValueError for wrong options, LlamaExtError when `path` exists or cannot be written.
    """
    if not isinstance(model, Llama):
        raise ValueError(f"hf.save: model: expected a Llama, got {type(model).__name__}")
    convert.parse_dtype(dtype), convert.parse_size(shard_size)
    tensors = {name: Entry(tuple(p.shape), p.dtype, lambda p=p: p.detach())
               for name, p in model.named_parameters()}
    weights = Weights(None, "ours", model.config, tensors, tokenizer and Path(tokenizer))
    convert.write(weights, path, "hf", dtype, shard_size)
