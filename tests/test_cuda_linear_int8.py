"""Shapes and addresses at which the CUDA kernels of linear_int8 take another path; any backend."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, check_op, cut, far_apart, randn, shifted

HALF = [torch.bfloat16, torch.float16]


def weights(N, K):
    return torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N) * 0.01 + 1e-3


def check(x, weight, scale):
    with torch.no_grad():
        check_op(lambda x: lx.linear_int8(x, weight, scale.float()),
                 lambda x: lx.ref.linear_int8(x, weight, scale), x, dtype=x.dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("K", [16, 48, 64, 80, 512, 528, 2048 + 32, 4096])
def test_lengths_of_the_sum(dtype, K):
    """Parts of a stretch, stretches for some of the warps, and more than once around."""
    for rows in (1, 8, 9, 33):
        check(randn(rows, K, dtype=dtype), *weights(24, K))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 32, 33, 64, 65, 130])
def test_numbers_of_rows_and_outputs(dtype, rows):
    """Part of a block of 8, whole ones, several blocks of a grid; outputs that fill no block."""
    for N in (1, 16, 20, 127, 129, 300):
        check(randn(rows, 80, dtype=dtype), *weights(N, 80))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["x", "weight", "stride", "K"])
def test_one_misaligned_operand(dtype, which):
    """Goes element by element."""
    for rows in (3, 40):
        K = 72 if which == "K" else 64
        x, (weight, scale) = randn(rows, K, dtype=dtype), weights(19, K)
        if which == "x":
            x = shifted(x)
        if which == "weight":
            weight = shifted(weight)
        if which == "stride":
            weight = torch.nn.functional.pad(weight, (0, 9))[:, :K]
        check(x, weight, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_lengths_in_aligned_rows(dtype):
    """What lies between the rows, at addresses that vectors could read, is not looked at."""
    pad = torch.nn.functional.pad
    for rows in (3, 40):
        x, (weight, scale) = randn(rows, 72, dtype=dtype), weights(19, 72)
        check(pad(x, (0, 8), value=float("nan"))[:, :72], pad(weight, (0, 8), value=1)[:, :72],
              scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_meets_its_own_input(dtype):
    """One product that is not 0 at a time: every place along K."""
    K = 192
    x = torch.eye(K, dtype=dtype) * 2
    weight = torch.randint(-128, 128, (17, K), dtype=torch.int8)
    scale = 2.0 ** -torch.arange(17) if dtype != torch.float16 else torch.ones(17)
    y = lx.linear_int8(x, weight, scale)
    assert torch.equal(y, (2 * weight.double() * scale[:, None]).t().to(dtype))
    few = torch.cat([lx.linear_int8(x[i:i + 8], weight, scale) for i in range(0, K, 8)])
    assert torch.equal(few, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_three_unfoldable_dimensions(dtype):
    check(cut(randn(3, 5, 3, 16, dtype=dtype)), *weights(20, 16))
    check(cut(randn(1, 2, 3, 32, dtype=dtype)), *weights(20, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_beyond_2_to_the_31_elements(dtype):
    x, (weight, scale) = randn(2, 64, dtype=dtype), weights(2, 64)
    check(far_apart(x), weight, scale)
    check(x, far_apart(weight), scale)
    check(randn(2, 63, dtype=dtype), far_apart(weight[:, :63]), scale)


@pytest.mark.parametrize("dtype", HALF)
def test_an_infinite_input_beside_short_sums(dtype):
    """What lies beyond K is no part of any sum."""
    x = randn(9, 80, dtype=dtype)
    x[4, 16] = float("inf")
    check(x, *weights(20, 80))
    check(x[:6], *weights(20, 80))
