"""Shapes and addresses at which the CUDA kernel of rope takes another path; on any backend."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, check_op, far_apart, randn, shifted

both_layouts = pytest.mark.parametrize("interleaved", [True, False])


def check(q, k, batch=(), table_dtype=torch.float32, table_layout=lambda t: t, interleaved=True,
          **options):
    angle = 6 * torch.rand(*batch, q.shape[1], q.shape[3] // 2, dtype=torch.float64)
    cos, sin = (table_layout(f(angle).to(table_dtype)) for f in (torch.cos, torch.sin))
    fns = [lambda q, k, fn=fn: fn(q, k, cos, sin, interleaved) for fn in (lx.rope_qk,
                                                                         lx.ref.rope_qk)]
    check_op(*fns, q, k, dtype=q.dtype, **options)


# Units of a head that divide a warp's 32 lanes, that leave some idle, that are more than 32.
@both_layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 48, 80, 128, 200, 320, 1040])
def test_head_dims(D, dtype, interleaved):
    tables = torch.promote_types(dtype, torch.float32)
    check(randn(2, 3, 5, D, dtype=dtype), randn(2, 3, 2, D, dtype=dtype), table_dtype=tables,
          interleaved=interleaved)


@both_layouts
@pytest.mark.parametrize("tokens, heads", [(1, 70), (300, 9), (1800, 3)])
def test_few_and_many_tokens(tokens, heads, interleaved):
    """A token's heads in many parts, in a few, in one; several batches of heads in a part."""
    for dtype in (torch.bfloat16, torch.float32):
        check(randn(1, tokens, heads, 16, dtype=dtype), randn(1, tokens, 1, 16, dtype=dtype),
              interleaved=interleaved)
    check(randn(2, tokens, 1, 8), randn(2, tokens, 30, 8), batch=(2,), interleaved=interleaved)


@both_layouts
def test_more_heads_than_a_lane_asks_for_at_once(interleaved):
    check(randn(1, 1800, 9, 128, dtype=torch.bfloat16),
          randn(1, 1800, 1, 128, dtype=torch.bfloat16), interleaved=interleaved)


@both_layouts
def test_tables_in_fp32_are_not_rounded_to_the_dtype_of_x(interleaved):
    angle = 6 * torch.rand(50, 32)
    x = torch.zeros(1, 50, 4, 64, dtype=torch.bfloat16)
    first = slice(0, None, 2) if interleaved else slice(0, 32)
    x[..., first] = 3
    y = lx.rope(x, angle.cos(), angle.sin(), interleaved)
    assert torch.equal(y[0, :, 0, first], (3 * angle.cos()).bfloat16())


@both_layouts
@pytest.mark.parametrize("table_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", ["q", "k", "cotangent", "tables", "none"])
def test_one_misaligned_operand(which, table_dtype, interleaved):
    q, k = (randn(2, 5, heads, 32, dtype=torch.bfloat16) for heads in (4, 2))
    def layout(name):
        return shifted if which == name else lambda t: t
    for batch in ((), (2,)):
        check(layout("q")(q), layout("k")(k), batch, table_dtype, layout("tables"), interleaved,
              cotangent_layout=layout("cotangent"))


@both_layouts
def test_table_rows_apart(interleaved):
    """Tables with rows of an odd stride, and in every other row of a longer one."""
    def odd(t):
        return torch.nn.functional.pad(t, (0, 1))[..., :-1]

    def every_other(t):
        return torch.stack((t, torch.full_like(t, float("nan"))), -2)[..., 0, :]
    for layout in (odd, every_other):
        for batch in ((), (3,)):
            check(randn(3, 4, 2, 32), randn(3, 4, 1, 32), batch, table_layout=layout,
                  interleaved=interleaved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_that_begin_beyond_2_to_the_31_elements(dtype):
    q, k = (far_apart(randn(2, heads * 16, dtype=dtype)) for heads in (4, 2))
    check(q.view(2, 1, 4, 16), k.view(2, 1, 2, 16))
    check(q.view(1, 2, 4, 16), k.view(1, 2, 2, 16))


def test_queries_and_keys_take_one_launch_forward_and_one_backward(vgpu):
    """As the attention layer calls it, on views of a fused projection, which are read in place."""
    q, k, _ = randn(2, 5, 3 * 4 * 16).requires_grad_().view(2, 5, 12, 16).chunk(3, 2)
    vgpu.take_log()
    q_out, k_out = lx.layers.RotaryEmbedding(16)(q, k)
    (q_out.sum() + k_out.sum()).backward()
    log = vgpu.take_log()
    assert [launch["kernel"].count("rope_kernel") for launch in log] == [1, 1]
    read = 2 * 2 * 5 * 4 * 16 * 4 + 2 * 5 * 8 * 4  # q and k, and cos and sin
    assert log[0]["global_unique_bytes_read"] == read
