"""RMSNorm (arXiv 1910.07467), alone and fused with the residual addition before it."""

import torch

from ._library import autocast_dtype, fake, kernel, needs_grad, single_backward

rmsnorm_fwd = kernel("rmsnorm_fwd")
rmsnorm_bwd = kernel("rmsnorm_bwd")
rmsnorm_residual_fwd = kernel("rmsnorm_residual_fwd")
rmsnorm_residual_bwd = kernel("rmsnorm_residual_bwd")


def _rstd_like(x):
    return x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))


@fake("rmsnorm_fwd")
def _(x, weight, eps):
    return x.new_empty(x.shape), _rstd_like(x)


@fake("rmsnorm_bwd")
def _(dy, x, weight, rstd, need_dweight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape if need_dweight else 0)


@fake("rmsnorm_residual_fwd")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)


@fake("rmsnorm_residual_bwd")
def _(dy, dh, h, weight, rstd, need_dweight):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if need_dweight else 0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = rmsnorm_fwd(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @single_backward("rmsnorm")
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        dx, dweight = rmsnorm_bwd(dy, x, weight, rstd, need_dweight)
        return dx if need_dx else None, dweight if need_dweight else None, None


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, h, rstd = rmsnorm_residual_fwd(x, residual, weight, eps)
        ctx.save_for_backward(h, weight, rstd)
        return y, h

    @single_backward("rmsnorm_residual")
    def backward(ctx, dy, dh):
        h, weight, rstd = ctx.saved_tensors
        need_dx, need_dresidual, need_dweight, _ = ctx.needs_input_grad
        dx, dweight = rmsnorm_residual_bwd(dy, dh, h, weight, rstd, need_dweight)
        return (dx if need_dx else None, dx if need_dresidual else None,
                dweight if need_dweight else None, None)


def rmsnorm(x, weight, eps=1e-6):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4).

    x: (..., D), float32, bfloat16, float16 or float64, any strides (no copy when the last is 1 and
    the leading dimensions fold into three). weight: (D,), the dtype of x or float32. Returns
    (..., D), contiguous, in the dtype of x; computed in fp32 (fp64 for float64), rounded once.
    Raises RuntimeError for shapes, dtypes or devices that do not fit.
    """
    if needs_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return rmsnorm_fwd(x, weight, eps)[0]


def rmsnorm_residual(x, residual, weight, eps=1e-6):
    """h = x + residual; returns (rmsnorm(h, weight, eps), h), both (..., D) in one kernel.

    x, residual: (..., D) of one dtype; under autocast they may differ and are promoted to the
    wider. h is rounded to that dtype before it is normalised. Otherwise as `rmsnorm`.
    """
    if x.dtype != residual.dtype and autocast_dtype(x) is not None:
        wider = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wider), residual.to(wider)
    if needs_grad(x, residual, weight):
        return _RMSNormResidual.apply(x, residual, weight, eps)
    return rmsnorm_residual_fwd(x, residual, weight, eps)[:2]
