import sys
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import llama_ext as lx
from harness import DTYPES, check_op, randn, scattered, transposed

linear_ce = sys.modules["llama_ext.ops.linear_cross_entropy"]


def case(rows, C, V, dtype, ignored=0):
    target = torch.randint(V, (rows,))
    target[:ignored] = -100
    return randn(rows, C, dtype=dtype, mean=0.05), randn(V, C, dtype=dtype, scale=C ** -0.5), target


def check_lce(hidden, weight, target, **options):
    """With a loss gradient of 1: the gradients of single logits are rounded before it reaches them,
    in PyTorch after; near -1 / rows they all round alike, so another factor rounds otherwise."""
    check_op(lx.linear_cross_entropy, lx.ref.linear_cross_entropy, hidden, weight, target,
             dtype=hidden.dtype, cotangent_layout=torch.ones_like, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, C, V", [(40, 64, 50), (17, 33, 301), (5, 1, 4), (3, 8, 1),
                                        (1, 16, 9)])
def test_one_chunk(isa, rows, C, V, dtype):
    check_lce(*case(rows, C, V, dtype, ignored=rows // 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks(monkeypatch, dtype):
    hidden, weight, target = case(101, 48, 77, dtype, ignored=3)
    monkeypatch.setattr(linear_ce, "CHUNK_BYTES", 10 * 77 * hidden.element_size())
    check_lce(hidden, weight, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.01},
    {"reduction": "none", "label_smoothing": 0.3, "z_loss": 0.02}])
def test_options(monkeypatch, options, dtype):
    hidden, weight, target = case(42, 33, 50, dtype, ignored=3)
    check_lce(hidden.view(6, 7, 33), weight, target.view(6, 7), **options)
    monkeypatch.setattr(linear_ce, "CHUNK_BYTES", 10 * 50 * hidden.element_size())
    check_lce(hidden, weight, target, **options)


def test_rows_have_cotangents_of_their_own():
    hidden, weight, target = case(40, 33, 50, torch.float32, ignored=3)
    check_op(lx.linear_cross_entropy, lx.ref.linear_cross_entropy, hidden, weight, target,
             dtype=torch.float32, reduction="none")


def test_fp16_gradients_do_not_vanish_under_the_mean():
    """With 20,000 rows an fp16 gradient of one logit, p / rows, is below the smallest subnormal."""
    hidden, weight, target = case(20000, 8, 300, torch.float16)
    check_lce(hidden, weight, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_proportional_to_that_of_the_loss(dtype):
    hidden, weight, target = case(20, 16, 30, dtype)

    def grads(factor):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        (lx.linear_cross_entropy(*leaves, target).double() * factor).backward()
        return [leaf.grad.double() for leaf in leaves]
    for one, many in zip(grads(1.0), grads(37.3)):
        assert (many - 37.3 * one).abs().max() <= torch.finfo(dtype).eps * many.abs().max() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_that_comes_twice_adds_the_same_gradients(dtype):
    hidden, weight, target = case(20, 16, 30, dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = lx.linear_cross_entropy(*leaves, target)
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves]
    for times in (2, 3):
        loss.backward(retain_graph=True)
        for leaf, grad in zip(leaves, once):
            torch.testing.assert_close(leaf.grad, times * grad)


def test_leading_dimensions_and_strides():
    hidden, weight, target = case(24, 16, 30, torch.float32)
    check_lce(hidden.view(2, 3, 4, 16), weight, target.view(2, 3, 4))
    check_lce(transposed(hidden.view(4, 6, 16)), weight.t().contiguous().t(), target.view(4, 6))
    check_lce(scattered(hidden), scattered(weight), torch.stack((target, target), 1)[:, 0])


def test_empty_and_nothing_counted():
    hidden, weight, target = case(0, 16, 30, torch.float32)
    assert lx.linear_cross_entropy(hidden, weight, target).isnan()
    hidden, weight, target = case(3, 16, 30, torch.float32, ignored=3)
    assert lx.linear_cross_entropy(hidden, weight, target).isnan()


def test_tied_weight_gets_both_gradients():
    weight, tokens = randn(30, 16), torch.randint(30, (9,))

    def grad(loss):
        leaf = weight.clone().requires_grad_()
        loss(torch.nn.functional.embedding(tokens, leaf), leaf, tokens).backward()
        return leaf.grad
    assert torch.allclose(grad(lx.linear_cross_entropy), grad(lx.ref.linear_cross_entropy),
                          atol=1e-6)


def peak_bytes(fn):
    """The most that fn's tensors took at any time, those it returns included; without what torch's
    product of matrices allocates and frees by itself, as it does on some CPUs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = fn()  # noqa: F841
    allocations = []

    def walk(events, product):
        for event in events:
            if event.tag == torch._C._profiler._EventType.Allocation:
                fields = event.extra_fields
                allocations.append((event.start_time_ns, product, fields.ptr, fields.alloc_size))
            walk(event.children, product or (event.id if event.name == "aten::mm" else None))

    walk(profiled.profiler.kineto_results.experimental_event_tree(), None)
    freed = {(product, ptr) for _, product, ptr, size in allocations if product and size < 0}
    sizes = [size for _, product, ptr, size in sorted(allocations) if (product, ptr) not in freed]
    return max(accumulate(sizes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_beyond_the_gradients_is_a_chunk(monkeypatch, pytestconfig, reduction, dtype):
    """Whatever the number of rows, forward and backward."""
    if pytestconfig.getoption("backend") != "cpu":
        pytest.skip("watches torch's own CPU allocator")
    chunk, small = 256 << 10, 64 << 10  # numbers per row, and a few allocations of torch's own
    monkeypatch.setattr(linear_ce, "CHUNK_BYTES", chunk)
    hidden, weight, target = case(1000, 128, 1000, dtype)
    loss = None

    def forward():
        nonlocal loss
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        loss = lx.linear_cross_entropy(*leaves, target, reduction=reduction)

    def backward():
        return torch.autograd.grad(loss.sum(), (hidden, weight))
    gradients = hidden.nbytes + weight.numel() * torch.promote_types(dtype, torch.float32).itemsize
    logits = 1000 * 1000 * hidden.element_size()
    for sweep in (forward, backward):
        results = 0 if reduction == "none" and sweep is forward else gradients
        if sweep is backward and reduction == "none":
            results += weight.nbytes  # in its own dtype, beside the sum
        assert peak_bytes(sweep) <= results + chunk + 64 * 1000 + small < results + logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_handed_over(pytestconfig, dtype):
    """Not copied, where nobody asks for them again."""
    if pytestconfig.getoption("backend") != "cpu":
        pytest.skip("watches torch's own CPU allocator")
    hidden, weight, target = case(100, 64, 300, dtype)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = lx.linear_cross_entropy(hidden, weight, target)
    assert peak_bytes(lambda: loss.backward(retain_graph=True)) >= hidden.nbytes + weight.nbytes
    hidden.grad = weight.grad = None
    assert peak_bytes(loss.backward) < 1000


@pytest.mark.parametrize("hidden, weight, target, sentence", [
    (randn(3, 4), randn(9, 5), torch.zeros(3).long(), r"weight: expected shape \(V, 4\), got "
                                                      r"\(9, 5\)"),
    (randn(3, 4), randn(9, 4).half(), torch.zeros(3).long(),
     "weight: expected the dtype of hidden, torch.float32, got torch.float16"),
    (randn(3, 4), randn(9, 4), torch.zeros(3), "target: expected int64, got torch.float32"),
    (randn(3, 4), randn(9, 4), torch.zeros(2).long(),
     r"target: expected the shape of hidden, \(3, 4\), without the last, got \(2,\)"),
    (randn(3, 4), randn(9, 4), torch.tensor([0, 9, 0]),
     "target: expected 0 to 8 or ignore_index -100, got 9 in row 1"),
])
def test_bad_input_is_one_sentence(hidden, weight, target, sentence):
    with pytest.raises(RuntimeError, match=f"^linear_cross_entropy: {sentence}$"):
        lx.linear_cross_entropy(hidden, weight, target)
