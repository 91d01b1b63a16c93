"""Rotary position embedding (arXiv 2104.09864)."""

import torch

from ._library import fake, kernel, needs_grad, single_backward

rope_rotate = kernel("rope")
rope_rotate_qk = kernel("rope_qk")


@fake("rope")
def _(x, cos, sin, interleaved, inverse):
    return x.new_empty(x.shape)


@fake("rope_qk")
def _(q, k, cos, sin, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rope_rotate(x, cos, sin, interleaved, False)

    @single_backward("rope")
    def backward(ctx, dy):
        return rope_rotate(dy, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rope_rotate_qk(q, k, cos, sin, interleaved, False)

    @single_backward("rope_qk")
    def backward(ctx, dq, dk):
        dq, dk = rope_rotate_qk(dq, dk, *ctx.saved_tensors, ctx.interleaved, True)
        need_dq, need_dk = ctx.needs_input_grad[:2]
        return dq if need_dq else None, dk if need_dk else None, None, None, None


def _check_tables(op, cos, sin):
    if cos.requires_grad or sin.requires_grad:
        raise RuntimeError(f"{op}: cos, sin: expected tensors that require no gradient, got "
                           "requires_grad=True")


def rope(x, cos, sin, interleaved=True):
    """Rotates the pairs of x by the angles of cos and sin (arXiv 2104.09864, eq. 34).

    x: (B, T, H, D), float32, bfloat16, float16 or float64, D even, any strides (no copy when the
    last is 1). cos, sin: (T, D/2), or (B, T, D/2) with a table for each sequence, in the dtype of x
    or float32; constants, so they must not require a gradient. interleaved: pairs (2i, 2i+1), as in
    Meta's weights; otherwise (i, i + D/2), as in Hugging Face's. Returns (B, T, H, D), contiguous,
    in the dtype of x. The backward is the inverse rotation. Raises RuntimeError for shapes, dtypes
    or devices that do not fit.
    """
    _check_tables("rope", cos, sin)
    if needs_grad(x):
        return _Rope.apply(x, cos, sin, interleaved)
    return rope_rotate(x, cos, sin, interleaved, False)


def rope_qk(q, k, cos, sin, interleaved=True):
    """(rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)) in one kernel.

    q: (B, T, H, D), k: (B, T, Hkv, D), of one dtype; views of one fused projection are read in
    place. The rest as `rope`.
    """
    _check_tables("rope_qk", cos, sin)
    if needs_grad(q, k):
        return _RopeQK.apply(q, k, cos, sin, interleaved)
    return rope_rotate_qk(q, k, cos, sin, interleaved, False)
