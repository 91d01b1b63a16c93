"""Shapes and addresses at which the CUDA kernels of cross_entropy take another path; on any
backend."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, check_op, cut, far_apart, randn, shifted

OPTIONS = [{}, {"label_smoothing": 0.2, "z_loss": 0.01, "reduction": "none"}]


def check(logits, ignored=0, **options):
    target = torch.randint(logits.shape[-1], logits.shape[:-1])
    target.view(-1)[:ignored] = -100
    for choice in OPTIONS:
        check_op(lx.cross_entropy, lx.ref.cross_entropy, logits, target, dtype=logits.dtype,
                 **choice, **options)


# A vector, fewer, more; a warp's; a block's batch of vectors and the next; several batches.
@pytest.mark.parametrize("V", [2, 7, 8, 9, 264, 1000, 8192, 8200, 8211, 20000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(V, dtype):
    """Rows that begin anywhere between two aligned addresses, one after the other."""
    check(randn(17 if V < 8192 else 5, V, dtype=dtype, scale=2), ignored=2)


@pytest.mark.parametrize("V", [128256, 262144])
def test_large_vocabularies(V):
    check(randn(2, V, dtype=torch.bfloat16))


@pytest.mark.parametrize("ascending", [True, False])
def test_the_largest_logit_comes_late_or_early(ascending):
    """Sums that are scaled down again and again, and never."""
    logits = torch.linspace(-80, 80, 3 * 8192).repeat(2, 1)
    check(logits if ascending else logits.flip(-1).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [64, 67])
def test_misaligned_logits(V, dtype):
    check(shifted(randn(9, V, dtype=dtype)))
    check(shifted(randn(9, V + 5, dtype=dtype))[:, 2:V + 2])


def test_gradient_rows_that_are_aligned_otherwise_than_the_logits():
    for columns in (67, 72):
        for begin in (0, 1):
            check(randn(9, 80, dtype=torch.bfloat16)[:, begin:begin + columns])


def test_rows_of_three_unfoldable_dimensions():
    for rows in [(3, 5, 3, 16), (2, 3, 7, 33)]:
        check(cut(randn(*rows)), ignored=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_beyond_2_to_the_31_elements(dtype):
    check(far_apart(randn(2, 64, dtype=dtype)))


@pytest.mark.parametrize("rows", [1, 31, 1023, 1025, 5000])
def test_the_mean_of_many_rows(rows):
    check(randn(rows, 3), ignored=rows // 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_ignored_row_is_not_read(dtype):
    """NaN there changes nothing."""
    logits, target = randn(5, 70, dtype=dtype), torch.tensor([3, -100, 69, 0, -100])
    poisoned = logits.clone()
    poisoned[target == -100] = float("nan")
    results = []
    for z in (logits, poisoned):
        z.requires_grad_()
        loss = lx.cross_entropy(z, target, label_smoothing=0.1, z_loss=0.1)
        loss.backward()
        results.append((loss.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[1][1][target == -100] == 0).all()
