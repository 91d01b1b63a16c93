import pytest
import torch

import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn

SHAPES = [(5, 64), (2, 3, 257), (1, 3), (37, 4096), (6, 1100), (70, 33), (2, 0), (0, 16), (3, 2, 2, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    if shape[-1] == 0:
        assert lx.rmsnorm(randn(*shape, dtype=dtype), randn(0, dtype=dtype)).shape == shape
        return
    x, residual = (randn(*shape, dtype=dtype) for _ in range(2))
    w = randn(shape[-1], dtype=dtype)
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, w, dtype=dtype)
    check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, x, residual, w, dtype=dtype)


def test_weight_gradient_summed_by_two_threads(isa):
    for dtype in (torch.bfloat16, torch.float32):
        check_op(lx.rmsnorm, lx.ref.rmsnorm, randn(1030, 1101, dtype=dtype),
                 randn(1101, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    x, residual = (LAYOUTS[layout](randn(3, 5, 2, 70, dtype=dtype)) for _ in range(2))
    w = LAYOUTS["scattered"](randn(70, dtype=dtype))
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, w, dtype=dtype, cotangent_layout=LAYOUTS[layout])
    check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, x, residual, w, dtype=dtype,
             cotangent_layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_weight(isa, dtype):
    check_op(lx.rmsnorm, lx.ref.rmsnorm, randn(9, 100, dtype=dtype), randn(100), dtype=dtype)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_large_and_small(scale):
    x, w = randn(9, 100, scale=scale), randn(100)
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, w, dtype=torch.float32)


def test_one_nan_stays_in_its_row():
    x = randn(4, 50)
    x[1, 3] = float("nan")
    y = lx.rmsnorm(x, torch.ones(50))
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


def test_gradcheck():
    x, residual, w = (randn(*shape, dtype=torch.float64).requires_grad_()
                      for shape in ((3, 7), (3, 7), (7,)))
    assert torch.autograd.gradcheck(lx.rmsnorm, (x, w))
    assert torch.autograd.gradcheck(lx.rmsnorm_residual, (x, residual, w))


@pytest.mark.parametrize("x, weight, sentence", [
    (randn(2, 3), randn(4), r"weight: expected shape \(3,\), the last of x, got \(4,\)"),
    (randn(2, 3), randn(3, 1), r"weight: expected shape \(3,\), the last of x, got \(3, 1\)"),
    (randn(2, 3), randn(3).double(), "weight: expected float32, got float64"),
    (randn(2, 3).bfloat16(), randn(3).half(),
     "weight: expected bfloat16 or float32, got float16"),
    (torch.ones(2, 3, dtype=torch.int32), randn(3),
     "x: expected float32, bfloat16, float16 or float64, got int32"),
    (torch.tensor(1.0), randn(1), r"x: expected shape \(..., D\), got \(\)"),
])
def test_bad_input_is_one_sentence(x, weight, sentence):
    with pytest.raises(RuntimeError, match=f"^rmsnorm: {sentence}$"):
        lx.rmsnorm(x, weight)


def test_bad_residual_is_one_sentence():
    x, w = randn(2, 3), randn(3)
    with pytest.raises(RuntimeError, match=r"^rmsnorm_residual: residual: expected the shape of x, "
                                           r"\(2, 3\), got \(3, 3\)$"):
        lx.rmsnorm_residual(x, randn(3, 3), w)
    sentence = "residual: expected the dtype of x, float32, got float16"
    with pytest.raises(RuntimeError, match=sentence):
        lx.rmsnorm_residual(x, x.half(), w)
    with pytest.raises(RuntimeError, match="^rmsnorm: eps: expected a number >= 0, got -1$"):
        lx.rmsnorm(x, w, -1)
