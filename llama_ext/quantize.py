"""Weights in int8, one scale for each output: half the memory of bf16, and half the bytes that
generating a token reads."""

import torch
from torch import nn

from .ops import linear_int8

_ROWS = 1024  # of a weight that are converted at once: what is held in fp32 stays small


def quantize(weight):
    """(int8 weight, scale) of a floating weight (N, K): each row is divided by scale = its largest
    magnitude / 127 and rounded to the nearest (absmax: arXiv 2208.07339, section 2.1). A row of
    zeros gets scale 0. scale: (N,), float32. Raises ValueError for weights that are not finite.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    with torch.no_grad():
        for rows, q, s in zip(weight.split(_ROWS), values.split(_ROWS), scale.split(_ROWS)):
            rows = rows.float()
            s.copy_(rows.abs().amax(1) / 127)
            q.copy_((rows / torch.where(s > 0, s, 1)[:, None]).round_().clamp_(-127, 127))
    if not scale.isfinite().all():
        raise ValueError("quantize: weight: expected finite numbers, got others")
    return values, scale


class Int8Linear(nn.Module):
    """nn.Linear without bias, its weight in int8: (..., in_features) -> (..., out_features).

    weight: int8 (out_features, in_features); scale: float32 (out_features,), whatever dtype the
    module is cast to. Both are buffers: they are saved and loaded, not trained.
    """

    def __init__(self, in_features, out_features, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8,
                                                   device=device))
        self.register_buffer("scale", torch.zeros(out_features, device=device))

    def forward(self, x):
        return linear_int8(x, self.weight, self.scale)

    def dequantize(self, dtype):
        """scale[:, None] * weight, rounded to dtype."""
        return (self.weight * self.scale[:, None]).to(dtype)

    def _apply(self, fn, recurse=True):
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_(model):
    """Replaces every nn.Linear of `model` by an Int8Linear, in place, one after another, so that
    no two copies of the model are ever held; returns the model.

    Embeddings and norms stay as they are, and with them the dtype of the activations; an output
    layer that is tied to the embeddings does too. Raises ValueError, before anything is changed,
    for a model without nn.Linear, and for one with biases.
    """
    places = [(parent, name) for parent in model.modules()
              for name, child in parent.named_children() if isinstance(child, nn.Linear)]
    if not places:
        raise ValueError("quantize_: model: expected nn.Linear modules in it, got none")
    for parent, name in places:
        if getattr(parent, name).bias is not None:
            raise ValueError(f"quantize_: model: expected linear layers without bias, got one at "
                             f"{name} of {type(parent).__name__}")
    for parent, name in places:
        setattr(parent, name, _int8_of(getattr(parent, name)))
    return model


def _int8_of(linear):
    layer = Int8Linear(linear.in_features, linear.out_features, device="meta")
    if linear.weight.is_meta:
        return layer
    layer.weight, layer.scale = quantize(linear.weight)
    return layer.train(linear.training)
