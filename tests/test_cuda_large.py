"""Tensors of more than 2^32 elements, inputs and outputs, forward and backward: their first row and
their last are right. On the virtual A100 only the blocks at the ends of each grid run, so that of
each tensor only the pages at its ends exist; a GPU runs all blocks."""

import contextlib

import pytest
import torch

import compare
import llama_ext as lx
from harness import randn

WIDTH = 2048
ROWS = 2 ** 32 // WIDTH + 8
NEEDED = 7 * ROWS * WIDTH * 2  # bytes, for rmsnorm_residual: x, residual, y, h, dy, dh and dx
BF16 = torch.bfloat16


def tall(*shape, dtype=BF16):
    """A tensor of shape (ROWS, *shape); if it is large, only its first row and its last are set."""
    if not shape:
        return randn(ROWS, dtype=dtype)
    x = torch.empty(ROWS, *shape, dtype=dtype)
    for row in (0, -1):
        x[row] = randn(*shape, dtype=dtype)
    return x


def ends(t):
    """The first row and the last of a tall tensor; any other as it is."""
    return torch.cat((t[:1], t[-1:])) if t.shape[0] == ROWS else t


def double(t):
    return t.double() if t.is_floating_point() else t


# An op's arguments, of which row i of the tall ones gives row i of the outputs; and its options.
CASES = {
    "rmsnorm": lambda: ([tall(WIDTH), randn(WIDTH, dtype=BF16)], {}),
    "rmsnorm_residual": lambda: ([tall(WIDTH), tall(WIDTH), randn(WIDTH, dtype=BF16)], {}),
    "swiglu": lambda: ([tall(WIDTH), tall(WIDTH)], {}),
    "rope": lambda: ([tall(1, WIDTH // 128, 128), *randn(2, 1, 64, dtype=BF16)], {}),
    "cross_entropy": lambda: ([tall(WIDTH), torch.arange(ROWS) % WIDTH], {"reduction": "none"}),
}


@pytest.fixture
def edges(pytestconfig):
    """edges(share): a context in which only that share of a grid's blocks runs, at either end."""
    backend = pytestconfig.getoption("backend")
    if backend == "vgpu":
        import vgpu.library

        return vgpu.library.edges
    if backend == "cpu":
        pytest.skip("of the CUDA kernels")
    if torch.cuda.mem_get_info()[0] < NEEDED * 1.1:
        pytest.skip(f"expected {NEEDED * 1.1 / 2 ** 30:.0f} GiB of free memory")
    return lambda share: contextlib.nullcontext()


@pytest.mark.parametrize("op", CASES)
def test_first_and_last_row(edges, op):
    args, options = CASES[op]()
    wanted = [i for i, t in enumerate(args) if t.shape[0] == ROWS and t.is_floating_point()]

    def forward(fn, args):
        for i in wanted:
            args[i].requires_grad_()
        outputs = fn(*args, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(outputs, args, cotangents):
        return torch.autograd.grad(outputs, [args[i] for i in wanted], cotangents)

    with edges(1 / 100):  # a little more than the backward needs: it reads what the forward saved
        outputs = forward(getattr(lx, op), args)
    cotangents = [tall(*o.shape[1:], dtype=o.dtype) for o in outputs]
    with edges(1 / 108):  # rmsnorm's backward has 108 blocks
        grads = backward(outputs, args, cotangents)
    assert all(t.shape[0] == ROWS for t in (*outputs, *grads))
    got = [ends(t.detach()) for t in (*outputs, *grads)]
    args, cotangents = [[ends(t.detach()) for t in ts] for ts in (args, cotangents)]
    del outputs, grads

    def of_definition(to):
        few = [to(t.detach().clone()) for t in args]
        outputs = forward(getattr(lx.ref, op), few)
        return [*outputs, *backward(outputs, few, [to(c) for c in cotangents])]

    for k, (result, true, base) in enumerate(zip(got, of_definition(double),
                                                 of_definition(lambda t: t))):
        assert result.dtype == base.dtype
        compare.check(result, true, base, what=f"output or gradient {k}")


def test_linear_int8_of_many_rows_of_x_and_of_weights(edges):
    """Forward: blocks of 64 rows of x, and of 16 of weights."""
    weight, scale = torch.randint(-128, 128, (WIDTH, WIDTH), dtype=torch.int8), torch.rand(WIDTH)
    x = torch.empty(ROWS, WIDTH, dtype=BF16)
    x[:64], x[-64:] = randn(2, 64, WIDTH, dtype=BF16)
    with edges(1 / 30_000), torch.no_grad():  # 16 blocks have all outputs of 64 rows
        y = lx.linear_int8(x, weight, scale)
    for some in (slice(0, 64), slice(-8, None)):
        compare.check(y[some], lx.ref.linear_int8(x[some].double(), weight, scale),
                      lx.ref.linear_int8(x[some], weight, scale))
    del x, y

    x, scale = randn(1, WIDTH, dtype=BF16), torch.rand(ROWS)
    weight = torch.empty(ROWS, WIDTH, dtype=torch.int8)
    weight[:16], weight[-16:] = torch.randint(-128, 128, (2, 16, WIDTH), dtype=torch.int8)
    with edges(1 / ROWS), torch.no_grad():
        y = lx.linear_int8(x, weight, scale)
    for some in (slice(0, 16), slice(-8, None)):
        compare.check(y[:, some], lx.ref.linear_int8(x.double(), weight[some], scale[some]),
                      lx.ref.linear_int8(x, weight[some], scale[some]))
