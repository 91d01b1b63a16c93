"""Linear layers with int8 weights, dequantised in registers."""

import torch

from ._library import autocast_dtype, fake, kernel, needs_grad, single_backward

linear_int8_fwd = kernel("linear_int8")


@fake("linear_int8")
def _(x, weight, scale):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _LinearInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return linear_int8_fwd(x, weight, scale)

    @single_backward("linear_int8")
    def backward(ctx, dy):
        weight, scale = ctx.saved_tensors
        acc = torch.promote_types(dy.dtype, torch.float32)
        return dy @ (weight * scale[:, None].to(acc)).to(dy.dtype), None, None


def linear_int8(x, weight, scale):
    """y = x @ (scale[:, None] * weight).T: weights in int8 with one scale for each output
    (weight-only quantisation, vector-wise as in arXiv 2208.07339, section 3.1).

    x: (..., K), float32, bfloat16, float16 or float64, any strides. weight: (N, K), int8. scale:
    (N,), float32; a constant, so it must not require a gradient. Returns (..., N), contiguous, in
    the dtype of x. Weights are not rounded again: products are summed in fp32 (fp64 for float64),
    scaled and rounded once. The gradient of x, for adapters on a frozen model, is
    dy @ (scale[:, None] * weight) with the weights rounded to the dtype of x. Under autocast x is
    cast as for torch's linear. Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    if scale.requires_grad:
        raise RuntimeError("linear_int8: scale: expected a tensor that requires no gradient, got "
                           "requires_grad=True")
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    if needs_grad(x):
        return _LinearInt8.apply(x, weight, scale)
    return linear_int8_fwd(x, weight, scale)
