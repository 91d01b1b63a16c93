"""Outputs so large that the CPU kernels write them past the caches: the same bits as in pieces."""

import pytest
import torch
from harness import randn

import llama_ext as lx

PIECE, PIECES = 120, 5  # rows; of 4096 bf16 all together just exceed the 4 MiB from which on they do


def rope(x, interleaved):
    angle = torch.linspace(0, 3, x.shape[-1] // 64).expand(len(x), -1)  # 32 heads
    heads = x.unflatten(-1, (32, -1))[None]
    return lx.rope(heads, angle.cos(), angle.sin(), interleaved)[0].flatten(1)


OPS = {
    "rmsnorm": lambda x: lx.rmsnorm(x, x[0].detach()),
    "rmsnorm_residual": lambda x: lx.rmsnorm_residual(x, x * 2, x[0].detach())[0],
    "swiglu": lambda x: lx.swiglu(x, x.flip(-1)),
    "swiglu in halves": lambda x: lx.swiglu(torch.cat((x, x), -1)),
    "rope": lambda x: rope(x, True),
    "rope in halves": lambda x: rope(x, False),
}


# Then heads of 130, misaligned in bf16, and of 136, aligned to one vector but not to two.
@pytest.mark.parametrize("width", [4096, 4160, 4352])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_large_outputs(pytestconfig, isa, op, dtype, width):
    if pytestconfig.getoption("backend") != "cpu":
        pytest.skip("of the CPU kernels")
    small, cotangent = (randn(PIECE, width, dtype=dtype) for _ in range(2))
    large = small.repeat(PIECES, 1).requires_grad_()
    expected = OPS[op](small.requires_grad_())
    expected.backward(cotangent)
    got = OPS[op](large)
    got.backward(cotangent.repeat(PIECES, 1))
    for i in range(0, len(got), PIECE):
        assert torch.equal(got[i:i + PIECE], expected)
        assert torch.equal(large.grad[i:i + PIECE], small.grad)


# Of the rows past the caches one element is written again: at the target, here in turn each of a
# vector's.
@pytest.mark.parametrize("width", [4096, 4097, 4112])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_gradient_of_logits(pytestconfig, isa, dtype, width):
    if pytestconfig.getoption("backend") != "cpu":
        pytest.skip("of the CPU kernels")
    small = randn(PIECE, width, dtype=dtype).requires_grad_()
    large = small.detach().repeat(PIECES, 1).requires_grad_()
    target, cotangent = torch.arange(PIECE) * 33 % width, randn(PIECE)
    lx.cross_entropy(small, target, reduction="none").backward(cotangent)
    lx.cross_entropy(large, target.repeat(PIECES), reduction="none").backward(
        cotangent.repeat(PIECES))
    for i in range(0, len(large), PIECE):
        assert torch.equal(large.grad[i:i + PIECE], small.grad)
