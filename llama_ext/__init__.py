"""llama_ext: fused LLaMA kernels (attention, RMSNorm, SwiGLU, RoPE, cross-entropy) for PyTorch."""

from . import ref
from .info import info
from .ops import (attention, cross_entropy, linear_cross_entropy, rmsnorm, rmsnorm_residual, rope,
                  swiglu)

__version__ = "0.1.0"
