"""The product for few rows against torch's, and when which of them serves a call."""

import itertools

import pytest
import torch

import llama_ext as lx
from compare import check
from harness import DTYPES, LAYOUTS, randn
from llama_ext.ops.linear import FEW_ROWS, linear, linear_fwd


def check_kernel(x, weight):
    exact = x.double() @ weight.double().t()
    check(linear_fwd(x, weight), exact, torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 15, 32, 33, 100, 320, 1111])
def test_every_instruction_set(isa, K, dtype):
    for rows in (1, 2, 3, 4, 5, 8, 11):
        check_kernel(randn(rows, K, dtype=dtype), randn(rows + 15, K, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_and_threads(isa, dtype):
    x, weight = randn(6, 3000, dtype=dtype), randn(131, 3000, dtype=dtype)
    check_kernel(x, weight)
    y = linear_fwd(x, weight)
    torch.set_num_threads(1)
    try:
        assert torch.equal(linear_fwd(x, weight), y)
    finally:
        torch.set_num_threads(2)
    assert torch.equal(linear_fwd(x[1:], weight), y[1:])


@pytest.mark.parametrize("rows, N, K", [(33, 300, 544), (600, 40, 1111), (150, 129, 1024)])
def test_many_rows(isa, rows, N, K):
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((N, K + 3), torch.nan, dtype=dtype)
        for columns in (slice(0, K), slice(3, K + 3)):
            weight = wide.fill_(torch.nan)[:, columns].copy_(randn(N, K))
            check_kernel(randn(rows, K, dtype=dtype), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(isa, layout, dtype):
    x, weight = (LAYOUTS[layout](randn(*shape, dtype=dtype)) for shape in ((3, 2, 48), (20, 48)))
    expected = linear_fwd(x.contiguous(), weight.contiguous())
    assert torch.equal(linear_fwd(x, weight), expected)
    wide = torch.full((20, 80), torch.nan, dtype=dtype)
    wide[:, 17:65] = weight
    assert torch.equal(linear_fwd(x, wide[:, 17:65]), expected)


def test_whole_numbers_are_exact(isa):
    for dtype, N in itertools.product(DTYPES, (1, 3, 4, 13)):
        x = torch.randint(-4, 5, (5, 250)).to(dtype)
        weight = torch.randint(-4, 5, (N, 250)).to(dtype)
        assert torch.equal(linear_fwd(x, weight), (x.double() @ weight.double().t()).to(dtype))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (7, 0), (0, 0)])
def test_empty(isa, shape):
    for N in (0, 5):
        for dtype in (torch.float32, torch.bfloat16):
            y = linear(randn(*shape, dtype=dtype), randn(N, shape[-1], dtype=dtype))
            assert y.shape == (*shape[:-1], N) and not y.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_a_number_and_infinity(isa, dtype):
    x, weight = randn(3, 64, dtype=dtype), randn(9, 64, dtype=dtype)
    x[0, 3], x[1, 60], weight[4, 7] = float("inf"), float("nan"), float("inf")
    check_kernel(x, weight)


@pytest.fixture
def called(monkeypatch):
    """The shapes of x that came to the kernel."""
    shapes = []

    def spy(x, weight):
        shapes.append(tuple(x.shape))
        return linear_fwd(x, weight)
    monkeypatch.setitem(linear.__globals__, "linear_fwd", spy)
    return shapes


def test_the_kernel_serves_few_rows_without_gradients(called):
    layer = lx.layers.Linear(16, 12)
    for shape in ((16,), (1, 1, 16), (2, FEW_ROWS // 2, 16)):
        with torch.no_grad():
            y = layer(randn(*shape))
        assert called.pop() == shape and y.shape == (*shape[:-1], 12)
    with torch.no_grad():
        layer(randn(FEW_ROWS + 1, 16))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(randn(2, 16)).dtype == torch.bfloat16
    layer(randn(2, 16)).sum().backward()
    assert not called and layer.weight.grad is not None


def test_errors_are_those_of_torch(called):
    for x in (torch.tensor(1.0), randn(2, 15), randn(2, 16, dtype=torch.float64)):
        with pytest.raises(RuntimeError), torch.no_grad():
            linear(x, randn(12, 16))
    assert not called


def test_compiled():
    layer, x = lx.layers.Linear(16, 12).requires_grad_(False), randn(2, 16)
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert compiled(randn(30, 16)).shape == (30, 12)


@pytest.mark.parametrize("x, weight, sentence", [
    (torch.tensor(1.0), randn(3, 4), r"x: expected shape \(..., K\), got \(\)"),
    (randn(2, 5), randn(3, 4), r"weight: expected shape \(N, 5\), K the last of x, got \(3, 4\)"),
    (randn(2, 4), randn(3, 4).half(), "weight: expected float32, got float16"),
    (torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64),
     "x: expected float32, bfloat16, float16 or float64, got int64")])
def test_bad_input_is_one_sentence(x, weight, sentence):
    with pytest.raises(RuntimeError, match=f"^linear: {sentence}$"):
        linear_fwd(x, weight)
