"""The operations: public functions with hand-written backward passes."""

from .attention import attention
from .cross_entropy import cross_entropy
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_int8 import linear_int8
from .rmsnorm import rmsnorm, rmsnorm_residual
from .rope import rope, rope_qk
from .swiglu import swiglu

__all__ = ["attention", "cross_entropy", "linear", "linear_cross_entropy", "linear_int8",
           "rmsnorm", "rmsnorm_residual", "rope", "rope_qk", "swiglu"]
