"""The operations: public functions with hand-written backward passes."""

from ..ref import attention, cross_entropy, linear_cross_entropy, rope, swiglu
from .rmsnorm import rmsnorm, rmsnorm_residual

__all__ = ["attention", "cross_entropy", "linear_cross_entropy", "rmsnorm", "rmsnorm_residual",
           "rope", "swiglu"]
