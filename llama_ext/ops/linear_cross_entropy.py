"""The output layer and its cross-entropy in one, without ever holding all logits.

The rows come in chunks: one matmul makes a chunk's logits, one kernel their losses, one overwrites
them with their gradient, and two matmuls turn that into the gradients of hidden and weight. Logits
and every other temporary take at most CHUNK_BYTES together.

For the mean and the sum the whole backward happens in the forward sweep, and backward() only
multiplies by a factor, the gradient of the loss. For fp16 the mean's 1 / count is part of that
factor, because gradients of single logits would vanish under it; otherwise of the sweep. For losses
of single rows, whose gradients are known only later, backward() sweeps once more.
"""

import torch

from ._library import autocast_dtype, needs_grad, single_backward
from .cross_entropy import (check_reduction, cross_entropy_bwd_, cross_entropy_fwd, mean_loss)

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


def _rows_at_once(width, dtype, need_dweight):
    """Rows at a time, of each of which `width` numbers are held: logits and a copy of hidden. For
    the gradient of weight in half dtypes, a product that is rounded before it is added takes half
    the room."""
    has_product = need_dweight and dtype != torch.promote_types(dtype, torch.float32)
    return max(1, CHUNK_BYTES // (2 if has_product else 1) // max(width * dtype.itemsize, 1))


def _dweight_dtype(rows, width, dtype):
    """What the gradient of weight is made in: fp32 where it is a sum over several chunks."""
    several = rows > _rows_at_once(width, dtype, True)
    return torch.promote_types(dtype, torch.float32) if several else dtype


def _slices(rows, row_bytes, budget):
    """Slices of at most `budget` bytes, or one row, that cover `rows` rows of row_bytes each."""
    step = max(1, budget // max(row_bytes, 1))
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _sweep(h, weight, t, options, dloss=None, lse=None, need_dhidden=False, need_dweight=False):
    """(loss, lse, dhidden, dweight) of h (rows, C), weight (V, C), t (rows,). dloss, the gradient
    of each row's loss or one for all, is needed for gradients only; an unwanted one comes back
    empty. lse, if known, spares the losses (returned empty). dweight is of _dweight_dtype."""
    rows, (V, C), dtype = h.shape[0], weight.shape, h.dtype
    acc = torch.promote_types(dtype, torch.float32)
    known = lse is not None
    loss = torch.empty(0 if known else rows, dtype=acc, device=h.device)
    lse = lse if known else torch.empty_like(loss)
    dhidden = torch.empty((rows, C) if need_dhidden else 0, dtype=dtype, device=h.device)
    step, wide = _rows_at_once(V + C, dtype, need_dweight), _dweight_dtype(rows, V + C, dtype)
    chunks = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]
    new = torch.empty if len(chunks) == 1 else torch.zeros
    dweight = new((V, C) if need_dweight else 0, dtype=wide, device=h.device)
    logits = torch.empty(min(step, rows), V, dtype=dtype, device=h.device)
    for part in chunks:
        z = torch.mm(h[part], weight.t(), out=logits[:part.stop - part.start])
        if not known:
            loss[part], lse[part] = cross_entropy_fwd(z, t[part], *options)
        if not (need_dhidden or need_dweight):
            continue
        cross_entropy_bwd_(dloss if dloss.dim() == 0 else dloss[part], z, t[part], lse[part],
                           *options)
        if need_dhidden:
            torch.mm(z, weight, out=dhidden[part])
        # On CPUs, the product of two transposed matrices is faster than of one.
        rows_of_h = h[part].t().contiguous().t() if need_dweight and h.is_cpu else h[part]
        if need_dweight and len(chunks) == 1:
            torch.mm(z.t(), rows_of_h, out=dweight)
        elif need_dweight and dtype != wide:
            # The sum may widen the product first: room for both.
            row_bytes = C * (h.element_size() + dweight.element_size())
            for columns in _slices(V, row_bytes, CHUNK_BYTES // 2):
                dweight[columns] += z[:, columns].t() @ rows_of_h
        elif need_dweight:
            dweight.addmm_(z.t(), rows_of_h)
    return loss, lse, dhidden, dweight


@torch.library.custom_op("llama_ext::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int,
        label_smoothing: float, z_loss: float, mean: bool, need_dhidden: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the mean or sum, factor, and the gradients for hidden (rows, C) and weight (V, C) before
    that factor); an unwanted gradient comes back empty."""
    _check(hidden, weight, target, ignore_index)
    h, t = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    acc = torch.promote_types(h.dtype, torch.float32)
    count = (t != ignore_index).sum().clamp(min=1).to(acc)
    dloss = count.reciprocal() if mean else torch.ones_like(count)
    in_sweep, factor = dloss, torch.ones_like(dloss)
    if h.dtype == torch.float16:
        in_sweep, factor = factor, in_sweep
    loss, _, dhidden, dweight = _sweep(h, weight, t, (ignore_index, label_smoothing, z_loss),
                                       in_sweep, None, need_dhidden, need_dweight)
    return (mean_loss(loss, t, ignore_index)[0] if mean else loss.sum(), factor, dhidden, dweight)


@linear_cross_entropy_fwd.register_fake
def _(hidden, weight, target, ignore_index, label_smoothing, z_loss, mean, need_dhidden,
      need_dweight):
    acc = torch.promote_types(hidden.dtype, torch.float32)
    rows = hidden.numel() // hidden.shape[-1] if hidden.shape[-1] else target.numel()
    return (hidden.new_empty((), dtype=acc), hidden.new_empty((), dtype=acc),
            hidden.new_empty((rows, hidden.shape[-1]) if need_dhidden else 0),
            weight.new_empty(weight.shape if need_dweight else 0,
                             dtype=_dweight_dtype(rows, sum(weight.shape), weight.dtype)))


@torch.library.custom_op("llama_ext::linear_cross_entropy_scale", mutates_args=())
def linear_cross_entropy_scale(grad: torch.Tensor, factor: torch.Tensor,
                               dtype: torch.dtype) -> torch.Tensor:
    """grad * factor, rounded once to dtype. factor: fp32 or fp64, one number."""
    out = torch.empty(grad.shape, dtype=dtype, device=grad.device)
    # Two temporaries in the factor's precision: grad may be half, which would round the factor.
    row_bytes = 2 * factor.element_size() * grad.shape[-1]
    for part in _slices(grad.shape[0], row_bytes, CHUNK_BYTES):
        out[part] = grad[part].to(factor.dtype) * factor
    return out


@linear_cross_entropy_scale.register_fake
def _(grad, factor, dtype):
    return torch.empty(grad.shape, dtype=dtype, device=grad.device)


@torch.library.custom_op("llama_ext::linear_cross_entropy_rows_fwd", mutates_args=())
def linear_cross_entropy_rows_fwd(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore_index: int,
        label_smoothing: float, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, lse) of every row, each of target's shape."""
    _check(hidden, weight, target, ignore_index)
    loss, lse, _, _ = _sweep(hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1),
                             (ignore_index, label_smoothing, z_loss))
    return loss.view(target.shape), lse.view(target.shape)


@linear_cross_entropy_rows_fwd.register_fake
def _(hidden, weight, target, ignore_index, label_smoothing, z_loss):
    acc = torch.promote_types(hidden.dtype, torch.float32)
    return (hidden.new_empty(target.shape, dtype=acc), hidden.new_empty(target.shape, dtype=acc))


@torch.library.custom_op("llama_ext::linear_cross_entropy_rows_bwd", mutates_args=())
def linear_cross_entropy_rows_bwd(
        dloss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
        lse: torch.Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
        need_dhidden: bool, need_dweight: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(dhidden, dweight), in their dtypes; an unwanted one comes back empty."""
    _, _, dhidden, dweight = _sweep(
        hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1),
        (ignore_index, label_smoothing, z_loss), dloss.reshape(-1).contiguous(), lse.reshape(-1),
        need_dhidden, need_dweight)
    return dhidden.view(hidden.shape) if need_dhidden else dhidden, dweight.to(weight.dtype)


@linear_cross_entropy_rows_bwd.register_fake
def _(dloss, hidden, weight, target, lse, ignore_index, label_smoothing, z_loss, need_dhidden,
      need_dweight):
    return (hidden.new_empty(hidden.shape if need_dhidden else 0),
            weight.new_empty(weight.shape if need_dweight else 0))


def _scaled(grad, factor, dtype):
    if type(factor) is torch.Tensor and factor.is_cpu and not torch.compiler.is_compiling():
        if grad.dtype == dtype and factor != 1:
            return grad * factor  # a single number, taken as it is, not rounded to dtype
        if factor == 1:
            # Whoever gets it may add to it in place: a graph that is kept keeps its own.
            keep = torch._C._autograd._get_current_graph_task_keep_graph()
            return grad.to(dtype, copy=keep)
    return linear_cross_entropy_scale(grad, factor, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, options, mean):
        loss, factor, dhidden, dweight = linear_cross_entropy_fwd(
            hidden, weight, target, *options, mean, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(factor, dhidden, dweight)
        ctx.hidden_shape, ctx.dtype = hidden.shape, hidden.dtype
        return loss

    @single_backward("linear_cross_entropy")
    def backward(ctx, dresult):
        factor, dhidden, dweight = ctx.saved_tensors
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        factor = factor * dresult
        if need_dhidden:
            dhidden = _scaled(dhidden, factor, ctx.dtype).view(ctx.hidden_shape)
        if need_dweight:
            dweight = _scaled(dweight, factor, ctx.dtype)
        return (dhidden if need_dhidden else None, dweight if need_dweight else None,
                None, None, None)


class _LinearCrossEntropyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, options):
        loss, lse = linear_cross_entropy_rows_fwd(hidden, weight, target, *options)
        ctx.save_for_backward(hidden, weight, target, lse)
        ctx.options = options
        return loss

    @single_backward("linear_cross_entropy")
    def backward(ctx, dloss):
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        dhidden, dweight = linear_cross_entropy_rows_bwd(
            dloss, *ctx.saved_tensors, *ctx.options, need_dhidden, need_dweight)
        return dhidden if need_dhidden else None, dweight if need_dweight else None, None, None


def linear_cross_entropy(hidden, weight, target, ignore_index=-100, *, reduction="mean",
                         label_smoothing=0.0, z_loss=0.0):
    """cross_entropy(hidden @ weight.T, target, ...) without ever holding all logits.

    hidden: (..., C), weight: (V, C), of one dtype: float32, bfloat16, float16 or float64 (under
    autocast both are cast to its dtype). target: (...), int64, from 0 to V - 1, or ignore_index for
    a row that does not count. reduction, label_smoothing, z_loss and what is returned: as
    `cross_entropy`; the backward of reduction "none" makes the logits once more.
    Beyond the gradients it takes at most 256 MiB (CHUNK_BYTES), or one row of logits, whatever the
    number of rows; the gradient of weight is held until the backward, in fp32 where it is a sum
    over several chunks. Raises RuntimeError for arguments that do not fit and, on the CPU, for
    targets out of range; on other devices such a row's loss and gradient are NaN.
    """
    check_reduction("linear_cross_entropy", reduction)
    dtype = autocast_dtype(hidden)
    if dtype is not None and hidden.dtype != torch.float64:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    options, want_grad = (ignore_index, label_smoothing, z_loss), needs_grad(hidden, weight)
    if reduction == "none":
        if want_grad:
            return _LinearCrossEntropyRows.apply(hidden, weight, target, options)
        return linear_cross_entropy_rows_fwd(hidden, weight, target, *options)[0]
    mean = reduction == "mean"
    if want_grad:
        return _LinearCrossEntropy.apply(hidden, weight, target, options, mean)
    return linear_cross_entropy_fwd(hidden, weight, target, *options, mean, False, False)[0]
