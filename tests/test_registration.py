"""Every registered operator passes torch's own check of its schema and shape rule."""

import pytest
import torch

import llama_ext  # noqa: F401  (registers the operators)
from harness import randn

X, W, RSTD = randn(3, 5, 16), randn(16), torch.rand(3, 5) + 0.5
Q, KV, LSE = randn(2, 6, 4, 8), randn(2, 9, 2, 8), randn(2, 4, 6)
PACKED_Q, PACKED_KV = randn(12, 4, 8), randn(18, 2, 8)
CU_Q, CU_K = (torch.tensor([0, a, b], dtype=torch.int32) for a, b in ((5, 12), (9, 18)))
COS, SIN = torch.rand(6, 4), torch.rand(6, 4)
LOGITS, TARGET, LOSS = randn(6, 11), torch.tensor([0, 3, -100, 10, 5, 5]), randn(6)
OPTIONS = 0.3, True, 0
NOT_TENSOR_OPS = {"cpu_isa", "cpu_isas", "cuda_kernels"}

CALLS = {
    "rmsnorm_fwd": [(X, W, 1e-6)],
    "rmsnorm_bwd": [(X, X, W, RSTD, True), (X, X, W, RSTD, False)],
    "rmsnorm_residual_fwd": [(X, X, W, 1e-6)],
    "rmsnorm_residual_bwd": [(X, X, X, W, RSTD, True), (X, X, X, W, RSTD, False)],
    "swiglu_fwd": [(X, X)],
    "swiglu_bwd": [(X, X, X)],
    "rope": [(Q, COS, SIN, True, False), (Q, COS, SIN, False, True)],
    "attention_fwd": [(Q, KV, KV, *OPTIONS, None, None),
                      (PACKED_Q, PACKED_KV, PACKED_KV, *OPTIONS, CU_Q, CU_K)],
    "attention_bwd": [(Q, None, Q, KV, KV, Q, LSE, *OPTIONS, None, None),
                      (Q, LSE, Q, KV, KV, Q, LSE, *OPTIONS, None, None),
                      (PACKED_Q, None, PACKED_Q, PACKED_KV, PACKED_KV, PACKED_Q, randn(4, 12),
                       *OPTIONS, CU_Q, CU_K)],
    "cross_entropy_fwd": [(LOGITS, TARGET, -100)],
    "mean_loss": [(LOSS, TARGET, -100)],
    "cross_entropy_bwd": [(torch.tensor(0.2), LOGITS, TARGET, LOSS, -100)],
    "cross_entropy_bwd_": [(LOSS, LOGITS.clone(), TARGET, LOSS, -100)],
    "linear_cross_entropy_fwd": [(X, randn(11, 16), torch.randint(11, (3, 5)), -100, True, True),
                                 (X, randn(11, 16), torch.randint(11, (3, 5)), -100, False, False)],
}


def test_every_operator_is_checked_here():
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("llama_ext::")]
    assert sorted(names) == sorted([*CALLS, *NOT_TENSOR_OPS])


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    for args in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.llama_ext, name).default, args)
