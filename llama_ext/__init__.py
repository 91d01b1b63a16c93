"""llama_ext: fused LLaMA kernels (attention, RMSNorm, SwiGLU, RoPE, cross-entropy) for PyTorch."""

from . import layers, ref
from .errors import LlamaExtError
from .info import info
from .model import Llama, LlamaConfig
from .ops import (attention, cross_entropy, linear_cross_entropy, linear_int8, rmsnorm,
                  rmsnorm_residual, rope, rope_qk, swiglu)
from .quantize import Int8Linear, quantize_

__version__ = "0.1.0"
