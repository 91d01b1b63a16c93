"""The output layer and its cross-entropy in one, without ever holding all logits.

The rows come in chunks of at most CHUNK_BYTES of logits: one matmul makes a chunk's logits, one
kernel their losses, one overwrites them with their gradient, and two matmuls turn that into the
gradients of hidden and weight. So the whole backward happens in the forward sweep, and backward()
only multiplies by a factor, the gradient of the loss. For fp16 the mean's 1 / count is part of that
factor, because gradients of single logits would vanish under it; otherwise of the sweep.
"""

import torch

from ._library import autocast_dtype, needs_grad, single_backward
from .cross_entropy import cross_entropy_bwd_, cross_entropy_fwd, mean_loss

CHUNK_BYTES = 256 << 20


def _check(hidden, weight, target, ignore_index):
    def expect(ok, argument, expected, got):
        if not ok:
            raise RuntimeError(
                f"linear_cross_entropy: {argument}: expected {expected}, got {got}")
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    expect(hidden.dtype in floats, "hidden", "float32, bfloat16, float16 or float64",
           str(hidden.dtype).removeprefix("torch."))
    expect(hidden.dim() >= 1, "hidden", "shape (..., C)", "()")
    expect(weight.dim() == 2 and weight.shape[1] == hidden.shape[-1], "weight",
           f"shape (V, {hidden.shape[-1]})", tuple(weight.shape))
    expect(weight.dtype == hidden.dtype, "weight", f"the dtype of hidden, {hidden.dtype}",
           weight.dtype)
    expect(target.dtype == torch.int64, "target", "int64", target.dtype)
    expect(target.shape == hidden.shape[:-1], "target",
           f"the shape of hidden, {tuple(hidden.shape)}, without the last", tuple(target.shape))
    for name, t in (("weight", weight), ("target", target)):
        expect(t.device == hidden.device, name, f"the device of hidden, {hidden.device}", t.device)
    if target.device.type == "cpu":
        V = weight.shape[0]
        bad = ((target < 0) | (target >= V)) & (target != ignore_index)
        if bad.any():
            row = bad.flatten().nonzero()[0].item()
            expect(False, "target", f"0 to {V - 1} or ignore_index {ignore_index}",
                   f"{target.flatten()[row].item()} in row {row}")


@torch.library.custom_op("llama_ext::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int,
        need_dhidden: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(mean, factor, and the gradients for hidden (rows, C) and weight (V, C) before that factor);
    an unwanted gradient comes back empty. dweight is fp32 for half dtypes."""
    _check(hidden, weight, target, ignore_index)
    (V, C), dtype = weight.shape, hidden.dtype
    h, t = hidden.reshape(-1, C), target.reshape(-1)
    rows, acc = h.shape[0], torch.promote_types(dtype, torch.float32)
    chunk = max(1, min(rows, CHUNK_BYTES // (max(V, 1) * h.element_size())))
    loss = torch.empty(rows, dtype=acc, device=h.device)
    dhidden = torch.empty((rows, C) if need_dhidden else 0, dtype=dtype, device=h.device)
    dweight = torch.zeros((V, C) if need_dweight else 0, dtype=acc, device=h.device)
    inv_count = (t != ignore_index).sum().clamp(min=1).to(acc).reciprocal()
    one = torch.ones_like(inv_count)
    in_sweep, factor = (one, inv_count) if dtype == torch.float16 else (inv_count, one)
    logits = torch.empty(chunk, V, dtype=dtype, device=h.device)
    for begin in range(0, rows, chunk):
        part = slice(begin, min(begin + chunk, rows))
        z = torch.mm(h[part], weight.t(), out=logits[:part.stop - begin])
        loss[part], lse = cross_entropy_fwd(z, t[part], ignore_index)
        if not (need_dhidden or need_dweight):
            continue
        cross_entropy_bwd_(in_sweep, z, t[part], lse, ignore_index)
        if need_dhidden:
            torch.mm(z, weight, out=dhidden[part])
        if need_dweight and dtype == acc:
            dweight.addmm_(z.t(), h[part])
        elif need_dweight:
            dweight += z.t() @ h[part]
    return mean_loss(loss, t, ignore_index)[0], factor, dhidden, dweight


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, target, ignore_index, need_dhidden, need_dweight):
    acc = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.numel() // hidden.shape[-1] if hidden.shape[-1] else target.numel()
    return (hidden.new_empty((), dtype=acc), hidden.new_empty((), dtype=acc),
            hidden.new_empty((rows, hidden.shape[-1]) if need_dhidden else 0),
            weight.new_empty(weight.shape if need_dweight else 0, dtype=acc))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, ignore_index):
        need_dhidden, need_dweight, _, _ = ctx.needs_input_grad
        mean, factor, dhidden, dweight = linear_cross_entropy_fwd(
            hidden, weight, target, ignore_index, need_dhidden, need_dweight)
        ctx.save_for_backward(factor, dhidden, dweight)
        ctx.hidden_shape, ctx.dtype = hidden.shape, hidden.dtype
        return mean

    @single_backward("linear_cross_entropy")
    def backward(ctx, dmean):
        factor, dhidden, dweight = ctx.saved_tensors
        need_dhidden, need_dweight, _, _ = ctx.needs_input_grad
        factor = factor * dmean

        def scaled(grad):  # in the factor's fp32 or fp64: half would round the factor first
            return (grad.to(factor.dtype) * factor).to(ctx.dtype)
        return (scaled(dhidden).view(ctx.hidden_shape) if need_dhidden else None,
                scaled(dweight) if need_dweight else None, None, None)


def linear_cross_entropy(hidden, weight, target, ignore_index=-100):
    """cross_entropy(hidden @ weight.T, target, ignore_index) without ever holding all logits.

    hidden: (..., C), weight: (V, C), of one dtype: float32, bfloat16, float16 or float64 (under
    autocast both are cast to its dtype). target: (...), int64, from 0 to V - 1, or ignore_index for
    a row that does not count. Returns a scalar, fp32 (fp64 for float64); NaN when no row counts.
    Beyond the gradients it takes one chunk of logits, at most 256 MiB (CHUNK_BYTES) or one row; the
    gradient of weight is summed over the chunks in fp32. Raises RuntimeError for shapes, dtypes or
    devices that do not fit and, on the CPU, for targets out of range.
    """
    dtype = autocast_dtype(hidden)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if needs_grad(hidden, weight):
        return _LinearCrossEntropy.apply(hidden, weight, target, ignore_index)
    return linear_cross_entropy_fwd(hidden, weight, target, ignore_index, False, False)[0]
