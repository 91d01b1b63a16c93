"""llama_ext: fused LLaMA kernels (attention, RMSNorm, SwiGLU, RoPE, cross-entropy) for PyTorch."""

import importlib

from . import layers, ref
from .errors import LlamaExtError
from .info import info
from .model import Llama, LlamaConfig
from .ops import (attention, cross_entropy, linear_cross_entropy, linear_int8, rmsnorm,
                  rmsnorm_residual, rope, rope_qk, swiglu)
from .patch import patch_hf, unpatch_hf
from .quantize import Int8Linear, quantize_

__version__ = "0.1.0"


def __getattr__(name):
    if name == "hf":  # needs packages that the kernels do not
        return importlib.import_module(".hf", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
