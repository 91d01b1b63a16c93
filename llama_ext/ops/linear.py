"""Linear layers for few rows, as in generation, on the CPU."""

import os

import torch
import torch.nn.functional as F

from ._library import autocast_dtype, fake, kernel, needs_grad

FEW_ROWS = 8  # with more, torch's own product is as fast

# Where the CPU's tensors go to other kernels (csrc/torch/backend.cpp), these are not there.
_HAS_KERNEL = "LLAMA_EXT_CPU_TENSORS_TO" not in os.environ
_PLAIN = torch.Tensor, torch.nn.Parameter

linear_fwd = kernel("linear")


@fake("linear")
def _(x, weight):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def serves(x):
    """Whether the kernel is for an x (..., K) like this."""
    return (_HAS_KERNEL and type(x) is torch.Tensor and x.is_cpu and x.dim() > 0
            and x.numel() <= FEW_ROWS * x.shape[-1] and x.is_floating_point()
            and autocast_dtype(x) is None)


def linear(x, weight):
    """y = x @ weight.T, as torch.nn.functional.linear without bias; x: (..., K), weight: (N, K).

    Up to FEW_ROWS rows of x on a CPU, without gradients and autocast, are served by a kernel that
    reads the weights once, at the speed of the memory; everything else, and every error, by torch.
    Sums are in fp32 (fp64 for float64), rounded once.
    """
    if (serves(x) and type(weight) in _PLAIN and weight.dim() == 2
            and weight.shape[1] == x.shape[-1] and weight.dtype == x.dtype
            and not needs_grad(x, weight)):
        return linear_fwd(x, weight)
    return F.linear(x, weight)
