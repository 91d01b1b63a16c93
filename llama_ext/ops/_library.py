"""Loads the compiled operators (torch.ops.llama_ext); what every op's Python side shares."""

import functools
from pathlib import Path

import torch

_OLDEST_TORCH = (2, 10)


def _load():
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        raise ImportError(f"llama_ext: torch: expected 2.10 or newer, got {torch.__version__}")
    binary = Path(__file__).parent.parent / "_C.so"
    if not binary.exists():
        raise ImportError(f"llama_ext: {binary.name}: expected the compiled kernels in "
                          f"{binary.parent}, got no such file; run pip install .")
    torch.ops.load_library(binary)


_load()


def kernel(name):
    """The compiled operator, ready to call."""
    return getattr(torch.ops.llama_ext, name).default


def fake(name):
    """Registers the decorated function as the operator's shape and dtype rule (FakeTensor)."""
    return torch.library.register_fake(f"llama_ext::{name}")


def needs_grad(*tensors):
    """Whether a call on these tensors is to be recorded for the backward pass."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def autocast_dtype(x):
    """The dtype autocast asks for on x's device, None outside autocast (meta has none)."""
    device = x.device.type
    active = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if active else None


def single_backward(op):
    """Decorates the backward of op's autograd function: differentiating it again raises."""
    def decorate(backward):
        @functools.wraps(backward)
        def checked(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(f"{op}: backward: expected create_graph=False, got True; the "
                                   "hand-written backward has no derivative of its own")
            return backward(ctx, *grads)
        return staticmethod(checked)
    return decorate
