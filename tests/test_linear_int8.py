"""linear_int8 against its definition: values, gradient, layouts, errors."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn, scattered, strided


def weights(N, K):
    """(weight, scale): every int8 there is, in rows of unlike scale."""
    return torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N) * 0.01 + 1e-3


def check(x, weight, scale, **options):
    check_op(lambda x: lx.linear_int8(x, weight, scale.float()),
             lambda x: lx.ref.linear_int8(x, weight, scale), x, dtype=x.dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 15, 16, 33, 64, 100, 320, 1111])
def test_every_instruction_set(isa, K, dtype):
    """Few rows and many; ragged numbers of rows, outputs and inputs."""
    for rows in (1, 2, 3, 4, 5, 8, 9, 30):
        check(randn(rows, K, dtype=dtype), *weights(rows + 6, K))


def test_several_blocks_of_widened_weights(isa):
    for N, K in ((67, 40), (9, 20_000), (3, 70_000)):
        check(randn(5, K), *weights(N, K))


@pytest.mark.parametrize("rows, N, K", [(33, 300, 544), (600, 40, 1111)])
def test_many_rows(isa, rows, N, K):
    for dtype in (torch.float32, torch.bfloat16):
        check(randn(rows, K, dtype=dtype), *weights(N, K))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (7, 0), (0, 0)])
def test_empty(isa, shape):
    for N in (0, 5):
        weight, scale = weights(N, shape[-1])
        for dtype in (torch.float32, torch.bfloat16):
            y = lx.linear_int8(randn(*shape, dtype=dtype), weight, scale)
            assert y.shape == (*shape[:-1], N) and not y.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    for rows in ((3, 1), (3, 5, 2)):
        x, (weight, scale) = LAYOUTS[layout](randn(*rows, 48, dtype=dtype)), weights(20, 48)
        check(x, weight, scale, cotangent_layout=LAYOUTS[layout])


def test_strides_of_weight_and_scale(isa):
    weight, scale = weights(20, 48)
    wide = torch.full((20, 80), 99, dtype=torch.int8)
    wide[:, 16:64] = weight
    for rows in (2, 7):
        x = randn(rows, 48)
        expected = lx.linear_int8(x, weight, scale)
        assert torch.equal(lx.linear_int8(x, wide[:, 16:64], scale), expected)
        wide[:, 17:65] = weight
        check(x, wide[:, 17:65], strided(scale))
        assert torch.equal(lx.linear_int8(x, weight.t().contiguous().t(), scattered(scale)),
                           expected)
        wide[:, 16:64] = weight
        assert torch.equal(lx.linear_int8(x[0], weight, scale),
                           lx.linear_int8(x[:1], weight, scale)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_numbers_are_exact(isa, dtype):
    """Sums of products that fp32 holds: nothing is rounded on the way."""
    top = 2 if dtype == torch.float16 else 1 << 6
    for rows, K in ((1, 256), (11, 256), (3, 250)):
        x = torch.randint(-top, top + 1, (rows, K)).to(dtype)
        weight = torch.randint(-128, 128, (13, K), dtype=torch.int8)
        y = lx.linear_int8(x, weight, torch.ones(13))
        assert torch.equal(y, (x.double() @ weight.double().t()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_inputs_and_zero_scales(isa, dtype):
    for rows in (2, 12):
        x, (weight, scale) = randn(rows, 64, dtype=dtype), weights(24, 64)
        scale[5] = 0
        x[0, 3] = float("inf")
        x[1, 60] = float("nan")
        with torch.no_grad():
            check(x, weight, scale)


def test_rows_do_not_depend_on_each_other_and_threads_change_nothing(isa):
    x, (weight, scale) = randn(37, 200, dtype=torch.bfloat16), weights(70, 200)
    y = lx.linear_int8(x, weight, scale)
    torch.set_num_threads(1)
    try:
        assert torch.equal(lx.linear_int8(x, weight, scale), y)
    finally:
        torch.set_num_threads(2)
    assert torch.equal(lx.linear_int8(x[5:30], weight, scale), y[5:30])


@pytest.mark.parametrize("x, weight, scale, sentence", [
    (torch.tensor(1.0), *weights(3, 4), r"x: expected shape \(..., K\), got \(\)"),
    (randn(2, 5), *weights(3, 4),
     r"weight: expected shape \(N, 5\), K the last of x, got \(3, 4\)"),
    (randn(2, 4), weights(3, 4)[0][0], torch.ones(3),
     r"weight: expected shape \(N, 4\), K the last of x, got \(4,\)"),
    (randn(2, 4), randn(3, 4), torch.ones(3), "weight: expected int8, got float32"),
    (randn(2, 4), weights(3, 4)[0], torch.ones(2),
     r"scale: expected shape \(3,\), the first of weight, got \(2,\)"),
    (randn(2, 4), weights(3, 4)[0], torch.ones(3).half(),
     "scale: expected float32, got float16"),
    (torch.ones(2, 4, dtype=torch.int64), *weights(3, 4),
     "x: expected float32, bfloat16, float16 or float64, got int64"),
    (randn(2, 4), weights(3, 4)[0], torch.ones(3, requires_grad=True),
     "scale: expected a tensor that requires no gradient, got requires_grad=True"),
])
def test_bad_input_is_one_sentence(x, weight, scale, sentence):
    with pytest.raises(RuntimeError, match=f"^linear_int8: {sentence}$"):
        lx.linear_int8(x, weight, scale)
