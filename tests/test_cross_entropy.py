import pytest
import torch
import torch.nn.functional as F

import llama_ext as lx
from harness import DTYPES, LAYOUTS, check_op, randn, strided
from llama_ext.ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

SHAPES = [(5, 64), (2, 3, 257), (4, 1), (37, 4099), (0, 16), (1, 50000), (64, 33)]


def targets(*shape, V, ignored=0):
    """Random targets, the first `ignored` of them not counted."""
    t = torch.randint(V, shape)
    t.view(-1)[:ignored] = -100
    return t


def check_ce(logits, target, **kwargs):
    """A loss in fp32 from half logits is judged as fp32; its gradient is in the logits' dtype."""
    check_op(lx.cross_entropy, lx.ref.cross_entropy, logits, target, dtype=logits.dtype, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set(isa, shape, dtype):
    logits = randn(*shape, dtype=dtype, scale=2)
    check_ce(logits, targets(*shape[:-1], V=shape[-1], ignored=1 if shape[0] > 1 else 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, dtype):
    check_ce(LAYOUTS[layout](randn(3, 5, 2, 70, dtype=dtype)), targets(3, 5, 2, V=70))
    strided_target = targets(3, 5, 4, V=70)[..., ::2]
    check_ce(randn(3, 5, 2, 70, dtype=dtype), strided_target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_ignore_index_and_sparse_mask(isa, dtype):
    target = torch.full((50,), 7)
    target[[3, 17, 49]] = torch.tensor([1, 2, 10])
    check_ce(randn(50, 11, dtype=dtype), target, ignore_index=7)


def test_loss_of_half_logits_is_as_good_as_fp32():
    logits, target = randn(40, 1000, dtype=torch.bfloat16), targets(40, V=1000)
    got, true = lx.cross_entropy(logits, target), lx.ref.cross_entropy(logits.double(), target)
    assert got.dtype == torch.float32
    assert abs(got - true) <= 3e-7 * true


def test_ignored_rows_have_exactly_zero_gradient():
    logits = randn(6, 9).requires_grad_()
    lx.cross_entropy(logits, targets(6, V=9, ignored=2)).backward()
    assert (logits.grad[:2] == 0).all() and (logits.grad[2:] != 0).all()


def test_nothing_counted_gives_nan_and_no_gradient():
    logits = randn(3, 9).requires_grad_()
    loss = lx.cross_entropy(logits, targets(3, V=9, ignored=3))
    loss.backward()
    assert loss.isnan() and (logits.grad == 0).all()
    assert lx.cross_entropy(randn(0, 9), targets(0, V=9)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_logits_and_masked_columns(isa, dtype):
    logits = randn(8, 100, dtype=dtype, scale=1e4)
    logits[:, 50:70] = -float("inf")
    target = targets(8, V=50)
    check_ce(logits, target)
    assert lx.cross_entropy(logits, target).isfinite()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [-float("inf"), -200.0, 200.0])
def test_first_columns_far_from_the_largest(isa, first, dtype):
    logits = randn(3, 700, dtype=dtype, scale=3)
    logits[:, :300] += first  # 700 or more below or above the others
    logits[:, :300] *= 4
    check_ce(logits, targets(3, V=700))
    last = logits.clone()
    last[1, 690] = float("nan")
    loss = lx.cross_entropy(last, torch.tensor([5, 5, 5]), reduction="none")
    assert loss.isnan().tolist()[1] and not loss[[0, 2]].isnan().any()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_non_finite_rows_give_what_the_formula_gives(isa, value):
    for logits in (torch.full((1, 37), value), randn(1, 37)):
        logits[0, 20] = value
        for target in (torch.tensor([20]), torch.tensor([3])):
            got, expected = (f(logits, target) for f in (lx.cross_entropy, lx.ref.cross_entropy))
            assert torch.allclose(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_own_cotangent(dtype):
    logits, target = randn(7, 33, dtype=dtype), targets(7, V=33, ignored=1)
    loss, lse = cross_entropy_fwd(logits, target, -100, 0.0, 0.0)
    dloss = randn(7, dtype=loss.dtype)
    got = cross_entropy_bwd(dloss, logits, target, lse, -100, 0.0, 0.0)

    def grad(z):
        z = z.detach().requires_grad_()
        rows = F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), target,
                               reduction="none")
        rows.backward(dloss.to(rows.dtype))
        return z.grad
    from compare import check
    check(got, grad(logits.double()), grad(logits), dtype)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_agrees_with_torch(reduction, label_smoothing):
    logits, target = randn(3, 5, 70), targets(3, 5, V=70, ignored=2)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)
    got = lx.cross_entropy(logits, target, **options).flatten()
    assert torch.allclose(got, expected.flatten(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"z_loss": 0.01},
    {"reduction": "none", "label_smoothing": 0.3, "z_loss": 0.02},
    {"reduction": "sum", "label_smoothing": 1.0}])
def test_options(isa, options, dtype):
    for shape in ((3, 5, 257), (7, 1), (2, 5000), (0, 9)):
        ignored = 2 if shape[0] > 2 else 0
        check_ce(randn(*shape, dtype=dtype, scale=2), targets(*shape[:-1], V=shape[-1],
                                                              ignored=ignored), **options)
    check_ce(strided(randn(3, 5, 70, dtype=dtype)), targets(3, 5, V=70), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_backward_gives_the_same_bits_in_the_memory_of_the_logits(reduction, dtype):
    source, target = randn(6, 33, dtype=dtype), targets(6, V=33, ignored=1)
    kept, overwritten = source.clone().requires_grad_(), source.clone()
    logits = overwritten.requires_grad_() * 1
    for z, inplace in ((kept, False), (logits, True)):
        z.retain_grad()
        loss = lx.cross_entropy(z, target, reduction=reduction, inplace_backward=inplace)
        loss.sum().backward(retain_graph=True)
    assert torch.equal(kept.grad, overwritten.grad)
    assert torch.equal(kept.grad, logits.detach()) and not torch.equal(source, logits.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("logits, target, sentence", [
    (randn(3, 9), torch.tensor([0, 1]), r"target: expected the shape of logits, \(3, 9\), without "
                                        r"the last, got \(2,\)"),
    (randn(3, 9), torch.zeros(3, dtype=torch.int32), "target: expected int64, got int32"),
    (torch.tensor(1.0), torch.tensor(0), r"logits: expected shape \(..., V\), got \(\)"),
    (torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, dtype=torch.int64),
     "logits: expected float32, bfloat16, float16 or float64, got int64"),
])
def test_bad_input_is_one_sentence(logits, target, sentence):
    with pytest.raises(RuntimeError, match=f"^cross_entropy: {sentence}$"):
        lx.cross_entropy(logits, target)


def test_a_target_out_of_range(pytestconfig):
    """Found before the kernel runs on the CPU; elsewhere it makes its row NaN, and only that."""
    for bad, row in ((9, 1), (-1, 2)):
        logits, target = randn(3, 9).requires_grad_(), torch.tensor([0, 1, 2])
        target[row] = bad
        if pytestconfig.getoption("backend") == "cpu":
            with pytest.raises(RuntimeError, match="^cross_entropy: target: expected 0 to 8 or "
                                                   f"ignore_index -100, got {bad} in row {row}$"):
                lx.cross_entropy(logits, target)
        else:
            loss = lx.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
            loss.sum().backward()
            for rows in (loss[:, None], logits.grad):
                assert rows[row].isnan().all() and rows[[3 - row, 0]].isfinite().all()


@pytest.mark.parametrize("options, sentence", [
    ({"reduction": "avg"}, "reduction: expected mean, sum or none, got avg"),
    ({"label_smoothing": 1.5}, "label_smoothing: expected a number from 0 to 1, got 1.5"),
    ({"inplace_backward": True}, r"logits: expected a contiguous tensor for inplace_backward, got "
                                 r"strides \(21, 1\)"),
])
def test_bad_options_are_one_sentence(options, sentence):
    logits = strided(randn(3, 9)).requires_grad_()
    with pytest.raises(RuntimeError, match=f"^cross_entropy: {sentence}$"):
        lx.cross_entropy(logits, torch.zeros(3, dtype=torch.int64), **options)
