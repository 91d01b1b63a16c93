"""What is particular to the CUDA kernels of rmsnorm: the traffic of each path, on the virtual A100
(machine code: test_cuda_counts.py); long, odd, misaligned and far-apart rows, on any backend."""

import pytest
import torch

import llama_ext as lx
from harness import DTYPES, check_op, cut, far_apart, randn, shifted


def traffic(log, ideal_bytes):
    """Ratios to the ideal: bytes to and from memory, sectors per request, shared wavefronts."""
    def total(*keys):
        return sum(launch[key] for launch in log for key in keys)
    return (total("global_unique_bytes_read", "global_unique_bytes_written") / ideal_bytes,
            total("global_load_sectors", "global_store_sectors")
            / total("global_load_sectors_ideal", "global_store_sectors_ideal"),
            total("shared_wavefronts") / total("shared_wavefronts_ideal"),
            total("global_load_bytes", "global_store_bytes") / ideal_bytes)


def measure(vgpu, rows, width, residual, make=randn):
    """The launches of a forward and of a backward in bf16, with what each must move at least."""
    x, r, w, dy, dh = (make(*shape, dtype=torch.bfloat16).requires_grad_(i < 3)
                       for i, shape in enumerate([(rows, width)] * 2 + [(width,)]
                                                 + [(rows, width)] * 2))
    vgpu.take_log()
    if residual:
        y, h = lx.rmsnorm_residual(x, r, w)
    else:
        y = lx.rmsnorm(x, w)
    forward = vgpu.take_log()
    torch.autograd.backward((y, h) if residual else y, (dy, dh) if residual else dy)
    backward = [launch for launch in vgpu.take_log() if "rmsnorm_bwd" in launch["kernel"]]
    assert len(forward) == 1 and len(backward) == 2
    tensor, small = rows * width * 2, rows * 4 + width * 2  # one (rows, width); rstd and a weight
    return ((forward, (4 if residual else 2) * tensor + small),
            (backward, (4 if residual else 3) * tensor + small + width * 2))


@pytest.mark.parametrize("what, width, make, kept, sector_limit", [
    ("odd", 4095, randn, True, 1.4),
    ("misaligned", 4096, lambda *shape, dtype: shifted(randn(*shape, dtype=dtype)), True, 1.4),
    ("odd, not kept", 9999, randn, False, 1.4), ("not kept", 65536, randn, False, 1.02)])
def test_traffic_of_the_other_paths(vgpu, summary, what, width, make, kept, sector_limit):
    """Each byte comes once from memory, and is asked for once where rows are kept: the ideal, and
    the weight for every row, twice in the backward. A warp's 64 bytes of single bf16, where they do
    not begin a sector, touch three instead of two."""
    rows = 16
    sums = rows // 4 * width * 4  # of dweight: written, read by the next kernel, and where rows are
    measured = measure(vgpu, rows, width, False, make)  # not kept read by the block that wrote them
    for name, (log, ideal) in zip(("forward", "backward"), measured):
        if name == "backward":
            ideal += (2 if kept else 3) * sums
        size, sectors, wavefronts, requested = traffic(log, ideal)
        summary.append(f"rmsnorm {name}, {rows} x {width} bf16 ({what}), over the ideal: bytes "
                       f"{size:.3f} sectors {sectors:.3f}; bytes asked of L1 {requested:.3f}")
        assert size <= 1.01 and sectors <= sector_limit and wavefronts <= 1.01
        assert requested <= (1.65 if kept else 2.5)


# Rows by the paths a kernel takes: one vector; a warp's full and over-full; two blocks' worth; the
# longest kept forward and backward; the first that are read twice; odd ones in one warp, in several
# groups, kept forward alone, and not kept.
@pytest.mark.parametrize("width", [1, 8, 32, 257, 504, 1000, 1024, 1032, 2056, 3001, 4097, 8195,
                                   16384, 16392, 32776, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths(width, dtype):
    rows = 5 if width < 16384 else 2
    x, r = (randn(rows, width, dtype=dtype) for _ in range(2))
    w = randn(width, dtype=dtype)
    check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, x, r, w, dtype=dtype)
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, w, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_rows_than_parts_and_groups(dtype):
    """More than 108 parts of 4 rows; several groups of rows in a block, and rows left over."""
    x, r = (randn(499, 80, dtype=dtype) for _ in range(2))
    check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, x, r, randn(80, dtype=dtype),
             dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("which", ["x", "residual", "weight", "cotangent"])
def test_one_misaligned_operand(which, dtype):
    x, r, w = (randn(*shape, dtype=dtype) for shape in ((6, 64), (6, 64), (64,)))
    x, r, w = (shifted(t) if which == name else t
               for name, t in (("x", x), ("residual", r), ("weight", w)))
    layout = shifted if which == "cotangent" else (lambda t: t)
    check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, x, r, w, dtype=dtype,
             cotangent_layout=layout)
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, w, dtype=dtype, cotangent_layout=layout)


def test_rows_of_three_unfoldable_dimensions():
    """Each of its own, with sizes that are no powers of two."""
    for rows in [(3, 5, 3, 16), (2, 3, 7, 32)]:
        x, r, w = (randn(*shape) for shape in (rows, rows, rows[-1:]))
        check_op(lx.rmsnorm_residual, lx.ref.rmsnorm_residual, cut(x), cut(r), w,
                 dtype=torch.float32, cotangent_layout=cut)


def test_the_least_multiple_of_eps_counts():
    """Inputs so small that eps is most of the mean square."""
    check_op(lx.rmsnorm, lx.ref.rmsnorm, randn(5, 72, scale=1e-4), randn(72), dtype=torch.float32,
             eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_begin_beyond_2_to_the_31_elements(dtype):
    x = far_apart(randn(2, 64, dtype=dtype))
    check_op(lx.rmsnorm, lx.ref.rmsnorm, x, randn(64, dtype=dtype), dtype=dtype)
