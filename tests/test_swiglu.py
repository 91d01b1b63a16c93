import pytest
import torch

import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn

SHAPES = [(5, 64), (2, 3, 257), (1, 1), (300, 128), (70, 33), (2, 0), (0, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    gate, up = (randn(*shape, dtype=dtype, scale=3) for _ in range(2))
    check_op(lx.swiglu, lx.ref.swiglu, gate, up, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    gate, up = (LAYOUTS[layout](randn(3, 5, 2, 70, dtype=dtype)) for _ in range(2))
    check_op(lx.swiglu, lx.ref.swiglu, gate, up, dtype=dtype, cotangent_layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_of_one_buffer(layout, dtype):
    """Read in place; without `up` the gradient is one buffer as well."""
    for F in (48, 7, 0):
        gate_up = LAYOUTS[layout](randn(7, 5, 2 * F, dtype=dtype))
        check_op(lx.swiglu, lx.ref.swiglu, gate_up, dtype=dtype)
        check_op(lx.swiglu, lx.ref.swiglu, *gate_up.chunk(2, -1), dtype=dtype,
                 cotangent_layout=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_non_finite_gates(isa, dtype):
    inf = float("inf")
    gate = torch.tensor([-inf, -1e4, -1e2, -88.0, -20.0, 0.0, 20.0, 88.0, 1e2, 1e4, inf,
                         float("nan")], dtype=dtype)
    check_op(lx.swiglu, lx.ref.swiglu, gate, torch.full_like(gate, 1.5), dtype=dtype)


@pytest.mark.parametrize("gate, up, sentence", [
    (randn(2, 3), randn(3, 2), r"up: expected the shape of gate, \(2, 3\), got \(3, 2\)"),
    (randn(2, 3), randn(2, 3).half(), "up: expected the dtype of gate, float32, got float16"),
    (torch.tensor(1.0), torch.tensor(1.0), r"gate: expected shape \(..., F\), got \(\)"),
    (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64),
     "gate: expected float32, bfloat16, float16 or float64, got int64"),
    (randn(2, 3), None, r"gate: expected shape \(..., 2F\) where up is not given, got \(2, 3\)"),
])
def test_bad_input_is_one_sentence(gate, up, sentence):
    with pytest.raises(RuntimeError, match=f"^swiglu: {sentence}$"):
        lx.swiglu(gate, up)
