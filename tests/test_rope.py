import pytest
import torch

import compare
import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn, scattered, transposed

SHAPES = [(2, 5, 3, 64), (1, 7, 2, 6), (3, 1, 1, 2), (2, 17, 4, 130), (1, 3, 2, 1030), (2, 0, 3, 8),
          (1, 4, 0, 8), (2, 3, 2, 0)]
both_layouts = pytest.mark.parametrize("interleaved", [True, False])


def tables(*shape, dtype=torch.float32):
    """cos and sin of random angles."""
    angle = 6 * torch.rand(shape, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype, interleaved):
    B, T, H, D = shape
    x = randn(*shape, dtype=dtype)
    for table_dtype in {dtype, torch.float32 if dtype != torch.float64 else dtype}:
        for batch in ((), (B,)):
            cos, sin = tables(*batch, T, D // 2, dtype=table_dtype)
            check_rope(x, cos, sin, interleaved)


def check_rope(x, cos, sin, interleaved, **kwargs):
    """The tables are constants, so they are bound into op and definition."""
    def op(x):
        return lx.rope(x, cos, sin, interleaved)

    def ref(x):
        return lx.ref.rope(x, cos, sin, interleaved)
    check_op(op, ref, x, dtype=x.dtype, **kwargs)


@both_layouts
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, interleaved):
    x = LAYOUTS[layout](randn(3, 5, 2, 36, dtype=torch.bfloat16))
    cos, sin = tables(3, 5, 18)
    check_rope(x, LAYOUTS[layout](cos), sin, interleaved, cotangent_layout=LAYOUTS[layout])
    check_rope(x, LAYOUTS[layout](cos), LAYOUTS[layout](sin), interleaved)


@both_layouts
def test_slices_of_a_fused_projection(interleaved):
    qkv = randn(2, 6, 3, 4, 32)
    cos, sin = tables(6, 16)
    for part in qkv.unbind(2):
        check_rope(part, cos, sin, interleaved)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (1, 5), (0, 2), (2, 0)])
def test_queries_and_keys_in_one_kernel(isa, heads, dtype, interleaved):
    H, Hkv = heads
    qkv = randn(2, 5, (H + 2 * Hkv) * 16, dtype=dtype).view(2, 5, -1, 16)  # one fused projection
    q, k = qkv[:, :, :H], qkv[:, :, H:H + Hkv]
    for batch in ((), (2,)):
        cos, sin = tables(*batch, 5, 8, dtype=torch.promote_types(dtype, torch.float32))
        fns = [lambda q, k, fn=fn: fn(q, k, cos, sin, interleaved)
               for fn in (lx.rope_qk, lx.ref.rope_qk)]
        check_op(*fns, q, k, dtype=dtype)
        check_op(*fns, scattered(q), transposed(k), dtype=dtype, cotangent_layout=transposed)


@both_layouts
def test_backward_is_the_inverse_rotation(interleaved):
    x, (cos, sin) = randn(1, 5, 2, 16, dtype=torch.float64), tables(5, 8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = lx.rope(leaf, cos, sin, interleaved)
    y.backward(y.detach())
    compare.check(leaf.grad, x)


def test_layouts_differ_by_a_permutation():
    x, (cos, sin) = randn(1, 5, 2, 16, dtype=torch.float64), tables(5, 8, dtype=torch.float64)
    halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    y = lx.rope(halves, cos, sin, interleaved=False)
    compare.check(torch.stack(y.chunk(2, -1), -1).flatten(-2), lx.rope(x, cos, sin))


def cs(*shape, dtype=torch.float32):
    return (torch.ones(shape, dtype=dtype),) * 2


@pytest.mark.parametrize("x, table, sentence", [
    (randn(2, 3, 4, 5), cs(3, 2), "x: expected an even last dimension, got 5"),
    (randn(3, 4, 6), cs(3, 3), r"x: expected shape \(B, T, H, D\), got \(3, 4, 6\)"),
    (randn(2, 3, 4, 6), cs(3, 6),
     r"cos: expected shape \(3, 3\) or \(2, 3, 3\), got \(3, 6\)"),
    (randn(2, 3, 4, 6), cs(4, 3, 3),
     r"cos: expected shape \(3, 3\) or \(2, 3, 3\), got \(4, 3, 3\)"),
    (randn(2, 3, 4, 6), (torch.ones(3, 3), torch.ones(2, 3, 3)),
     r"sin: expected the shape of cos, \(3, 3\), got \(2, 3, 3\)"),
    (randn(2, 3, 4, 6), cs(3, 3, dtype=torch.float64), "cos: expected float32, got float64"),
    (randn(2, 3, 4, 6).int(), cs(3, 3),
     "x: expected float32, bfloat16, float16 or float64, got int32"),
])
def test_bad_input_is_one_sentence(x, table, sentence):
    with pytest.raises(RuntimeError, match=f"^rope: {sentence}$"):
        lx.rope(x, *table)


@pytest.mark.parametrize("q, k, sentence", [
    (randn(2, 3, 4, 6), randn(2, 3, 4, 8),
     r"k: expected shape \(2, 3, Hkv, 6\), got \(2, 3, 4, 8\)"),
    (randn(2, 3, 4, 6), randn(2, 3, 6), r"k: expected shape \(B, T, H, D\), got \(2, 3, 6\)"),
    (randn(2, 3, 4, 6), randn(2, 3, 4, 6).half(),
     "k: expected the dtype of q, float32, got float16"),
    (randn(2, 3, 4, 6), randn(2, 3, 1, 6).double(),
     "k: expected the dtype of q, float32, got float64"),
])
def test_bad_pair_is_one_sentence(q, k, sentence):
    with pytest.raises(RuntimeError, match=f"^rope_qk: {sentence}$"):
        lx.rope_qk(q, k, *cs(3, 3))


def test_tables_that_want_a_gradient_are_refused():
    cos, sin = tables(3, 4)
    with pytest.raises(RuntimeError, match="^rope: cos, sin: expected tensors that require no"):
        lx.rope(randn(1, 3, 2, 8), cos.requires_grad_(), sin)


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_nan_of_any_payload_stays_nan(isa, interleaved):
    """All bits set: rounding to bf16 must not carry into the sign."""
    table = torch.full((3, 20), 0x7fffffff, dtype=torch.int32).view(torch.float32)
    x = torch.ones(1, 3, 2, 40, dtype=torch.bfloat16)
    assert lx.rope(x, table, table, interleaved).isnan().all()
