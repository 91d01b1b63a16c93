"""Rotary position embedding (arXiv 2104.09864)."""

import torch

from ._library import fake, kernel, needs_grad, single_backward

rope_rotate = kernel("rope")


@fake("rope")
def _(x, cos, sin, interleaved, inverse):
    return x.new_empty(x.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rope_rotate(x, cos, sin, interleaved, False)

    @single_backward("rope")
    def backward(ctx, dy):
        return rope_rotate(dy, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def rope(x, cos, sin, interleaved=True):
    """Rotates the pairs of x by the angles of cos and sin (arXiv 2104.09864, eq. 34).

    x: (B, T, H, D), float32, bfloat16, float16 or float64, D even, any strides (no copy when the
    last is 1). cos, sin: (T, D/2), or (B, T, D/2) with a table for each sequence, in the dtype of x
    or float32; constants, so they must not require a gradient. interleaved: pairs (2i, 2i+1), as in
    Meta's weights; otherwise (i, i + D/2), as in Hugging Face's. Returns (B, T, H, D), contiguous,
    in the dtype of x. The backward is the inverse rotation. Raises RuntimeError for shapes, dtypes
    or devices that do not fit.
    """
    if cos.requires_grad or sin.requires_grad:
        raise RuntimeError("rope: cos, sin: expected tensors that require no gradient, got "
                           "requires_grad=True")
    if needs_grad(x):
        return _Rope.apply(x, cos, sin, interleaved)
    return rope_rotate(x, cos, sin, interleaved, False)
