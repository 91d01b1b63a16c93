"""Cross-entropy of logits."""

import torch

from ._library import fake, kernel, needs_grad, single_backward

cross_entropy_fwd = kernel("cross_entropy_fwd")
cross_entropy_bwd = kernel("cross_entropy_bwd")
cross_entropy_bwd_ = kernel("cross_entropy_bwd_")
mean_loss = kernel("mean_loss")


@fake("cross_entropy_fwd")
def _(logits, target, ignore_index, label_smoothing, z_loss):
    acc = torch.promote_types(logits.dtype, torch.float32)
    return (logits.new_empty(logits.shape[:-1], dtype=acc),
            logits.new_empty(logits.shape[:-1], dtype=acc))


@fake("mean_loss")
def _(loss, target, ignore_index):
    return loss.new_empty(()), loss.new_empty(())


@fake("cross_entropy_bwd")
def _(dloss, logits, target, lse, ignore_index, label_smoothing, z_loss):
    return logits.new_empty(logits.shape)


@fake("cross_entropy_bwd_")
def _(dloss, logits, target, lse, ignore_index, label_smoothing, z_loss):
    return None


def check_reduction(op, reduction):
    if reduction not in ("mean", "sum", "none"):
        raise RuntimeError(f"{op}: reduction: expected mean, sum or none, got {reduction}")


def reduced(loss, target, ignore_index, reduction):
    """(what the public function returns of the rows' losses, the gradient of a row's loss when its
    own is 1). None for the latter: 1."""
    if reduction == "mean":
        return mean_loss(loss, target, ignore_index)
    return (loss.sum() if reduction == "sum" else loss), None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, options, reduction, inplace_backward):
        loss, lse = cross_entropy_fwd(logits, target, *options)
        result, factor = reduced(loss, target, options[0], reduction)
        ctx.save_for_backward(logits, target, lse, factor)
        ctx.options, ctx.inplace = options, inplace_backward
        return result

    @single_backward("cross_entropy")
    def backward(ctx, dresult):
        logits, target, lse, factor = ctx.saved_tensors
        dloss = dresult.contiguous() if factor is None else dresult * factor
        if ctx.inplace:
            cross_entropy_bwd_(dloss, logits, target, lse, *ctx.options)
            torch.autograd.graph.increment_version(logits)
            dlogits = logits
        else:
            dlogits = cross_entropy_bwd(dloss, logits, target, lse, *ctx.options)
        return dlogits, None, None, None, None


def cross_entropy(logits, target, ignore_index=-100, *, reduction="mean", label_smoothing=0.0,
                  z_loss=0.0, inplace_backward=False):
    """log(sum(exp(logits))) - logits[target] of each row, by default the mean over counted rows.

    logits: (..., V), float32, bfloat16, float16 or float64, any strides (no copy when the last is 1
    and the leading dimensions fold into three). target: (...), int64, from 0 to V - 1, or
    ignore_index for a row that does not count: it is not read, its loss is 0 and its gradient
    exactly 0. reduction: "mean" over the counted rows, a scalar, NaN when no row counts, as
    torch.nn.functional.cross_entropy; "sum"; "none" returns every row's loss, (...). Losses are
    fp32 (fp64 for float64 logits).
    label_smoothing: of the target, from 0 to 1, this share is spread evenly over all V columns
    (arXiv 1512.00567, sec. 7; PyTorch's definition). z_loss: adds z_loss * lse^2 with lse =
    log(sum(exp(logits))), which keeps lse near 0 (PaLM, arXiv 2204.02311, sec. 5).
    inplace_backward: the backward overwrites logits, which must be contiguous, with their gradient
    instead of allocating as much again; for a caller who needs the logits no more. (Not while
    torch.compile traces, which plans memory itself.)
    Raises RuntimeError for arguments that do not fit and, on the CPU, for targets out of range; on
    other devices such a row's loss and gradient are NaN.
    """
    check_reduction("cross_entropy", reduction)
    options = ignore_index, label_smoothing, z_loss
    if needs_grad(logits):
        inplace = inplace_backward and not torch.compiler.is_compiling()
        if inplace and not logits.is_contiguous():
            raise RuntimeError("cross_entropy: logits: expected a contiguous tensor for "
                               f"inplace_backward, got strides {logits.stride()}")
        return _CrossEntropy.apply(logits, target, options, reduction, inplace)
    loss, _ = cross_entropy_fwd(logits, target, *options)
    return reduced(loss, target, ignore_index, reduction)[0]
