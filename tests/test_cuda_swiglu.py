"""Shapes and addresses at which the CUDA kernels of swiglu take another path; on any backend."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, check_op, cut, far_apart, randn, shifted, strided


def check(*args, **options):
    check_op(lx.swiglu, lx.ref.swiglu, *args, dtype=args[0].dtype, **options)


@pytest.mark.parametrize("width", [8, 16, 504, 1032, 4096, 8192, 8200, 11008])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths(width, dtype):
    """One row's vectors, a chunk's and more, with gaps between the rows and, as one row, none."""
    for layout in (strided, lambda t: t):
        gate, up = (layout(randn(3, width, dtype=dtype)) for _ in range(2))
        check(gate, up, cotangent_layout=layout)
    check(randn(3, 2 * width, dtype=dtype))
    gate, up = (randn(3, width, dtype=dtype) for _ in range(2))
    check(gate, up, cotangent_layout=strided)
    check(gate, strided(up))
    check(strided(gate), up)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_short_rows(dtype):
    """Several rows in a block, and rows left over."""
    for width in (8, 40, 7):
        check(strided(randn(77, width, dtype=dtype)), randn(77, width, dtype=dtype))
        check(randn(77, 2 * width, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", ["gate", "up", "cotangent", "halves"])
def test_one_misaligned_operand(which, dtype):
    gate, up = (randn(6, 64, dtype=dtype) for _ in range(2))
    if which == "halves":
        return check(shifted(torch.cat((gate, up), -1)))
    check(shifted(gate) if which == "gate" else gate, shifted(up) if which == "up" else up,
          cotangent_layout=shifted if which == "cotangent" else lambda t: t)


def test_rows_of_three_unfoldable_dimensions():
    for rows in [(3, 5, 3, 16), (2, 3, 7, 32)]:
        gate, up = (randn(*rows) for _ in range(2))
        check(cut(gate), cut(up), cotangent_layout=cut)
        check(cut(gate), up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_beyond_2_to_the_31_elements(dtype):
    check(far_apart(randn(2, 64, dtype=dtype)), randn(2, 64, dtype=dtype))
