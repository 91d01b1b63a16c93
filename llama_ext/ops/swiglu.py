"""SwiGLU's elementwise part (arXiv 2002.05202)."""

import torch

from ._library import autocast_dtype, fake, kernel, needs_grad, single_backward

swiglu_fwd = kernel("swiglu_fwd")
swiglu_bwd = kernel("swiglu_bwd")
swiglu_halves_bwd = kernel("swiglu_halves_bwd")


@fake("swiglu_fwd")
def _(gate, up):
    return gate.new_empty(gate.shape)


@fake("swiglu_bwd")
def _(dout, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@fake("swiglu_halves_bwd")
def _(dout, gate_up):
    return gate_up.new_empty(gate_up.shape)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_fwd(gate, up)

    @single_backward("swiglu")
    def backward(ctx, dout):
        dgate, dup = swiglu_bwd(dout, *ctx.saved_tensors)
        need_dgate, need_dup = ctx.needs_input_grad
        return dgate if need_dgate else None, dup if need_dup else None


class _SwiGLUHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_fwd(*gate_up.chunk(2, -1))

    @single_backward("swiglu")
    def backward(ctx, dout):
        return swiglu_halves_bwd(dout, *ctx.saved_tensors)


def swiglu(gate, up=None):
    """silu(gate) * up, elementwise (arXiv 2002.05202, eq. 6, with Swish_1).

    gate, up: (..., F), one shape and dtype (float32, bfloat16, float16 or float64; under autocast
    they may differ and are promoted to the wider), any strides. up None: gate is (..., 2F), both in
    one, gate in the first half; nothing is copied, and the gradient is one (..., 2F) as well.
    Returns (..., F), contiguous; computed in fp32 (fp64 for float64), rounded once. The backward
    recomputes the sigmoid and writes both gradients in one pass. Raises RuntimeError for shapes,
    dtypes or devices that do not fit.
    """
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise RuntimeError("swiglu: gate: expected shape (..., 2F) where up is not given, got "
                               f"{tuple(gate.shape)}")
        return (_SwiGLUHalves.apply(gate) if needs_grad(gate) else
                swiglu_fwd(*gate.chunk(2, -1)))
    if gate.dtype != up.dtype and autocast_dtype(gate) is not None:
        wider = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(wider), up.to(wider)
    return _SwiGLU.apply(gate, up) if needs_grad(gate, up) else swiglu_fwd(gate, up)
