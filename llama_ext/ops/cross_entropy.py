"""Cross-entropy of logits."""

import torch

from ._library import fake, kernel, needs_grad, single_backward

cross_entropy_fwd = kernel("cross_entropy_fwd")
cross_entropy_bwd = kernel("cross_entropy_bwd")
cross_entropy_bwd_ = kernel("cross_entropy_bwd_")
mean_loss = kernel("mean_loss")


@fake("cross_entropy_fwd")
def _(logits, target, ignore_index):
    acc = torch.promote_types(logits.dtype, torch.float32)
    return (logits.new_empty(logits.shape[:-1], dtype=acc),
            logits.new_empty(logits.shape[:-1], dtype=acc))


@fake("mean_loss")
def _(loss, target, ignore_index):
    return loss.new_empty(()), loss.new_empty(())


@fake("cross_entropy_bwd")
def _(dloss, logits, target, lse, ignore_index):
    return logits.new_empty(logits.shape)


@fake("cross_entropy_bwd_")
def _(dloss, logits, target, lse, ignore_index):
    return None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        loss, lse = cross_entropy_fwd(logits, target, ignore_index)
        mean, inv_count = mean_loss(loss, target, ignore_index)
        ctx.save_for_backward(logits, target, lse, inv_count)
        ctx.ignore_index = ignore_index
        return mean

    @single_backward("cross_entropy")
    def backward(ctx, dmean):
        logits, target, lse, inv_count = ctx.saved_tensors
        dlogits = cross_entropy_bwd(dmean * inv_count, logits, target, lse, ctx.ignore_index)
        return dlogits, None, None


def cross_entropy(logits, target, ignore_index=-100):
    """Mean over the counted rows of log(sum(exp(logits))) - logits[target].

    logits: (..., V), float32, bfloat16, float16 or float64, any strides (no copy when the last is 1
    and the leading dimensions fold into three). target: (...), int64, from 0 to V - 1, or
    ignore_index for a row that does not count. Returns a scalar, fp32 (fp64 for float64 logits);
    NaN when no row counts, as torch.nn.functional.cross_entropy. Rows that do not count get exactly
    zero gradient. Raises RuntimeError for shapes, dtypes or devices that do not fit and, on the
    CPU, for targets out of range.
    """
    if needs_grad(logits):
        return _CrossEntropy.apply(logits, target, ignore_index)
    loss, _ = cross_entropy_fwd(logits, target, ignore_index)
    return mean_loss(loss, target, ignore_index)[0]
