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
V, ROWS, CE = randn(11, 16), torch.randint(11, (3, 5)), (-100, 0.1, 1e-4)
NOT_TENSOR_OPS = {"cpu_isa", "cpu_isas", "cuda_kernels"}
BLOCK_OPS = {"block_fwd", "block_bwd"}  # checked in test_block_use.py

CALLS = {
    "rmsnorm_fwd": [(X, W, 1e-6)],
    "rmsnorm_bwd": [(X, X, W, RSTD, True), (X, X, W, RSTD, False)],
    "rmsnorm_residual_fwd": [(X, X, W, 1e-6)],
    "rmsnorm_residual_bwd": [(X, X, X, W, RSTD, True), (X, X, X, W, RSTD, False)],
    "swiglu_fwd": [(X, X)],
    "swiglu_bwd": [(X, X, X)],
    "swiglu_halves_bwd": [(X[..., :8], X)],
    "rope": [(Q, COS, SIN, True, False), (Q, COS, SIN, False, True)],
    "rope_qk": [(Q, Q[:, :, :2], COS, SIN, True, False), (Q, Q, COS, SIN, False, True)],
    "attention_fwd": [(Q, KV, KV, *OPTIONS, None, None),
                      (PACKED_Q, PACKED_KV, PACKED_KV, *OPTIONS, CU_Q, CU_K)],
    "attention_bwd": [(Q, None, Q, KV, KV, Q, LSE, *OPTIONS, None, None),
                      (Q, LSE, Q, KV, KV, Q, LSE, *OPTIONS, None, None),
                      (PACKED_Q, None, PACKED_Q, PACKED_KV, PACKED_KV, PACKED_Q, randn(4, 12),
                       *OPTIONS, CU_Q, CU_K)],
    "cross_entropy_fwd": [(LOGITS, TARGET, *CE)],
    "mean_loss": [(LOSS, TARGET, -100)],
    "cross_entropy_bwd": [(torch.tensor(0.2), LOGITS, TARGET, LOSS, *CE)],
    "cross_entropy_bwd_": [(LOSS, LOGITS.clone(), TARGET, LOSS, *CE)],
    "blocks_cached": [(X[:1, :2], None, [W, *(randn(16, 16) for _ in range(4)), W, randn(20, 16),
                                         randn(20, 16), randn(16, 20)] * 2, [1e-6] * 4, 8, 0, True,
                       torch.rand(1, 2, 4), torch.rand(1, 2, 4), randn(2, 6, 2, 8),
                       randn(2, 6, 2, 8), torch.tensor([1, 2]),
                       torch.tensor([0, 2], dtype=torch.int32),
                       torch.tensor([0, 6], dtype=torch.int32))],
    "linear": [(X, randn(11, 16))],
    "linear_int8": [(X, torch.randint(-128, 128, (11, 16), dtype=torch.int8), torch.rand(11))],
    "linear_cross_entropy_fwd": [(X, V, ROWS, *CE, True, True, True),
                                 (X, V, ROWS, *CE, False, False, False)],
    "linear_cross_entropy_scale": [(X, torch.tensor(0.2), torch.bfloat16)],
    "linear_cross_entropy_rows_fwd": [(X, V, ROWS, *CE)],
    "linear_cross_entropy_rows_bwd": [(RSTD, X, V, ROWS, RSTD, *CE, True, True),
                                      (RSTD, X, V, ROWS, RSTD, *CE, False, False)],
}


def test_every_operator_is_checked_here():
    names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("llama_ext::")]
    assert sorted(names) == sorted([*CALLS, *NOT_TENSOR_OPS, *BLOCK_OPS])


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    for args in CALLS[name]:
        torch.library.opcheck(getattr(torch.ops.llama_ext, name).default, args)
