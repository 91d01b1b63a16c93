"""The tolerance rule must reject results that are a little wrong, and accept right ones."""

import pytest
import torch

import compare
import llama_ext as lx
from harness import randn

HALF = [torch.bfloat16, torch.float16]


def swiglu_case(dtype, seed):
    torch.manual_seed(seed)
    gate, up = randn(64, 256, dtype=dtype), randn(64, 256, dtype=dtype)
    true = lx.ref.swiglu(gate.double(), up.double())
    return true, lx.ref.swiglu(gate, up)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_right_results_pass(dtype, seed):
    true, base = swiglu_case(dtype, seed)
    assert compare.mismatch(true.to(dtype), true, base) is None
    assert compare.mismatch(base, true, base) is None


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seed", range(20))
def test_half_a_percent_is_rejected(dtype, seed):
    true, base = swiglu_case(dtype, seed)
    assert compare.mismatch((true * 1.005).to(dtype), true, base) is not None
    assert compare.mismatch((true * 0.995).to(dtype), true, base) is not None


def test_a_few_parts_per_million_are_rejected_in_fp32():
    true, base = swiglu_case(torch.float32, 0)
    assert compare.mismatch((true * (1 + 2e-6)).float(), true, base) is not None


def test_fp64_is_held_to_1e_11():
    true, _ = swiglu_case(torch.float64, 0)
    assert compare.mismatch(true * (1 + 1e-12), true) is None
    assert compare.mismatch(true * (1 + 1e-10), true) is not None


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_one_wrong_entry_is_rejected(dtype):
    true, base = swiglu_case(dtype, 0)
    got = true.to(dtype, copy=True)
    got[3, 5] += 0.05 * true.abs().max().to(dtype)
    assert "max|e|" in compare.mismatch(got, true, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_must_be_where_they_belong(value):
    true, base = swiglu_case(torch.float32, 0)
    got = true.float()
    got[0, 0] = value
    assert "non-finite" in compare.mismatch(got, true, base)
    true[0, 0] = base[0, 0] = value
    assert compare.mismatch(got, true, base) is None
    got[0, 0] = -float("inf")
    assert "non-finite" in compare.mismatch(got, true, base)


def test_shapes_must_agree():
    assert "shape" in compare.mismatch(torch.zeros(2), torch.zeros(3))


def test_a_gradient_scaled_by_one_percent_is_rejected():
    x, w, dy = randn(32, 512, dtype=torch.bfloat16), randn(512), randn(32, 512)
    def dw(x):
        weight = w.to(x.dtype).requires_grad_()
        lx.ref.rmsnorm(x, weight).backward(dy.to(x.dtype))
        return weight.grad
    true, base = dw(x.double()), dw(x)
    assert compare.mismatch(true.bfloat16(), true, base) is None
    assert compare.mismatch((true * 1.01).bfloat16(), true, base) is not None
