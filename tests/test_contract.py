"""What every op promises alike, and every registered operator with it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import compare
import llama_ext as lx
from harness import randn

B, T, H, D, F, V, C = 2, 6, 4, 8, 24, 11, 16


def tables(dtype=torch.float32):
    angle = torch.outer(torch.arange(T), torch.rand(D // 2)).to(dtype)
    return angle.cos(), angle.sin()


def heads(n, dtype):
    return randn(B, T, n, D, dtype=dtype)


# op -> inputs at a dtype; the floating ones require gradients, but for constants
INPUTS = {
    "rmsnorm": lambda dtype: (randn(B, T, C, dtype=dtype), randn(C, dtype=dtype)),
    "rmsnorm_residual": lambda dtype: (randn(B, T, C, dtype=dtype), randn(B, T, C, dtype=dtype),
                                       randn(C, dtype=dtype)),
    "swiglu": lambda dtype: (randn(B, T, F, dtype=dtype), randn(B, T, F, dtype=dtype)),
    "rope": lambda dtype: (heads(H, dtype), *tables(dtype)),
    "attention": lambda dtype: (heads(H, dtype), heads(2, dtype), heads(2, dtype)),
    "cross_entropy": lambda dtype: (randn(B, T, V, dtype=dtype), torch.randint(V, (B, T))),
    "linear_cross_entropy": lambda dtype: (randn(B, T, C, dtype=dtype), randn(V, C, dtype=dtype),
                                           torch.randint(V, (B, T))),
    "linear_int8": lambda dtype: (randn(B, T, C, dtype=dtype),
                                  torch.randint(-128, 128, (V, C), dtype=torch.int8),
                                  torch.rand(V) / 100),
}
CONSTANTS = {"rope": (1, 2), "linear_int8": (2,)}  # tables, scales
every_op = pytest.mark.parametrize("op", INPUTS)


def differentiable(op, args):
    return [i for i, a in enumerate(args)
            if a.is_floating_point() and i not in CONSTANTS.get(op, ())]


def leaves(op, args, frozen=()):
    wanted = differentiable(op, args)
    return [a.detach().clone().requires_grad_(i in wanted and i not in frozen)
            for i, a in enumerate(args)]


def total(outputs, seed=1):
    """A scalar with a random, non-uniform gradient."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
               for o in outputs)


def grads(fn, args):
    total(fn(*args)).backward()
    return [a.grad for a in args if a.requires_grad]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for g, e in zip(got, expected):
        assert torch.equal(g, e)


@every_op
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(op, dynamic):
    fn, args = getattr(lx, op), INPUTS[op](torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(grads(compiled, leaves(op, args)), grads(fn, leaves(op, args)))
    with torch.no_grad():
        assert_same([total(compiled(*args))], [total(fn(*args))])


@every_op
def test_autocast(op):
    fn, args = getattr(lx, op), leaves(op, INPUTS[op](torch.float32))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = fn(*args)
    out = out if isinstance(out, tuple) else (out,)
    lowered = op in ("attention", "linear_int8")
    for o in out:
        assert o.dtype == (torch.bfloat16 if lowered else torch.float32)
    total(out).backward()
    assert all(a.grad.dtype == torch.float32 for a in args if a.requires_grad)


@every_op
def test_autocast_takes_mixed_dtypes(op):
    if op not in ("rmsnorm_residual", "swiglu", "attention", "linear_cross_entropy"):
        return
    args = list(INPUTS[op](torch.float32))
    args[0] = args[0].bfloat16()
    args = leaves(op, args)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        total(getattr(lx, op)(*args)).backward()
    assert all(a.grad.dtype == a.dtype for a in args if a.requires_grad)


@every_op
def test_activation_checkpointing(op):
    fn, args = getattr(lx, op), INPUTS[op](torch.float32)
    def again(*args):
        return checkpoint(fn, *args, use_reentrant=False)
    assert_same(grads(again, leaves(op, args)), grads(fn, leaves(op, args)))


@every_op
def test_frozen_inputs_get_no_gradient_and_change_no_other(op):
    fn, args = getattr(lx, op), INPUTS[op](torch.float32)
    full = leaves(op, args)
    grads(fn, full)
    for frozen in differentiable(op, args):
        some = leaves(op, args, frozen=[frozen])
        if any(a.requires_grad for a in some):
            grads(fn, some)
        assert some[frozen].grad is None
        for a, b in zip(some, full):
            if a.requires_grad:
                assert torch.equal(a.grad, b.grad)


@every_op
def test_no_gradient_wanted_records_nothing(op):
    out = getattr(lx, op)(*INPUTS[op](torch.float32))
    assert not any(o.requires_grad for o in (out if isinstance(out, tuple) else (out,)))


@every_op
def test_backward_twice_gives_the_same_and_writes_no_input(op):
    args = leaves(op, INPUTS[op](torch.float32))
    before = [a.detach().clone() for a in args]
    loss = total(getattr(lx, op)(*args))
    loss.backward(retain_graph=True)
    first = [a.grad.clone() for a in args if a.requires_grad]
    loss.backward()
    assert_same([a.grad for a in args if a.requires_grad], [2 * g for g in first])
    assert_same([a.detach() for a in args], before)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_is_bitwise_reproducible(op, dtype):
    fn, args = getattr(lx, op), INPUTS[op](dtype)
    first = grads(fn, leaves(op, args))
    for _ in range(100):
        assert_same(grads(fn, leaves(op, args)), first)
    torch.set_num_threads(1)
    try:
        assert_same(grads(fn, leaves(op, args)), first)
    finally:
        torch.set_num_threads(2)


@every_op
def test_double_backward_raises(op):
    args = leaves(op, INPUTS[op](torch.float32))
    loss = total(getattr(lx, op)(*args))
    with pytest.raises(RuntimeError, match=f"^{op}: backward: expected create_graph=False"):
        torch.autograd.grad(loss, [a for a in args if a.requires_grad], create_graph=True)


@every_op
def test_gradcheck(op):
    args = leaves(op, INPUTS[op](torch.float64))
    assert torch.autograd.gradcheck(getattr(lx, op), args)


@every_op
def test_a_dtype_without_kernels_is_one_sentence(op):
    args = [a.to(torch.complex64) if a.is_floating_point() else a
            for a in INPUTS[op](torch.float32)]
    with pytest.raises(RuntimeError, match=rf"^{op}: \w+: expected float32.*, got [\w ]+$"):
        getattr(lx, op)(*args)


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_meta_tensors_tell_shape_and_dtype(op, dtype):
    def signature(args):
        out = getattr(lx, op)(*args)
        return [(o.shape, o.dtype, o.stride()) for o in (out if isinstance(out, tuple) else (out,))]
    args = INPUTS[op](dtype)
    assert signature([a.to("meta") for a in args]) == signature(args)
