"""Kernels from an independent compiler, Triton for sm_80, on the virtual A100: right results prove
the fragment layouts of mma and ldmatrix, the swizzles and the cp.async pipelines; and that there is
no complaint proves that the checks raise no false alarm."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[1] / "build/vgpu/triton"))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import vgpu  # noqa: E402


def compile_kernel(function, args, constants=(), num_warps=4, num_stages=3):
    """Compiles for sm_80. args: arrays and ints; constants: of the parameters after."""
    types = {np.dtype(np.uint16): "*bf16", np.dtype(np.float16): "*fp16",
             np.dtype(np.float32): "*fp32", np.dtype(np.int32): "*i32"}
    kinds = [types[a.dtype] if isinstance(a, np.ndarray) else "i32" for a in args]
    signature = dict(zip(function.arg_names, kinds + ["constexpr"] * len(constants)))
    # Arrays are 16-byte aligned; of the integers it holds where it does, as Triton's own launcher
    # finds out.
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args)
               if isinstance(a, np.ndarray) or a % 16 == 0}
    source = ASTSource(fn=function, signature=signature, attrs=aligned, constexprs={
        (len(args) + i,): value for i, value in enumerate(constants)})
    return triton.compile(source, target=GPUTarget("cuda", 80, 32),
                          options={"num_warps": num_warps, "num_stages": num_stages})


def launch(function, grid, args, constants=(), num_warps=4, num_stages=3, seed=0):
    kernel = compile_kernel(function, args, constants, num_warps, num_stages)
    module = vgpu.Device(seed=seed).load_ptx(kernel.asm["ptx"])
    return module.launch(kernel.metadata.name, grid, 32 * num_warps,
                         [*args, None, None], shared=kernel.metadata.shared)


def encode(x, dtype):
    x = np.asarray(x, np.float32)
    if dtype != "bf16":
        return x.astype(dtype)
    bits = x.view(np.uint32)
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def decode(x):
    return ((x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x).astype(
        np.float64)


def close(got, expected, dtype, units=1.0):
    """Within `units` of the output type's rounding, relative to the largest value of the row."""
    unit = {"bf16": 2.0 ** -8, "float16": 2.0 ** -11, "float32": 2.0 ** -22}[dtype]
    error = np.abs(decode(got) - expected)
    assert np.isfinite(decode(got)).all()
    assert (error <= units * unit * np.abs(expected).max(-1, keepdims=True)).all(), error.max()


def normal(*shape, dtype="float32", seed=0):
    return encode(np.random.default_rng(seed).standard_normal(shape), dtype)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(a_ptr + rm[:, None] * K + (k + rk)[None, :],
                    mask=(rm[:, None] < M) & ((k + rk)[None, :] < K), other=0.0)
        b = tl.load(b_ptr + (k + rk)[:, None] * N + rn[None, :],
                    mask=((k + rk)[:, None] < K) & (rn[None, :] < N), other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rm[:, None] * N + rn[None, :], acc.to(c_ptr.dtype.element_ty),
             mask=(rm[:, None] < M) & (rn[None, :] < N))


@pytest.mark.parametrize("dtype, tile, warps, stages", [
    ("bf16", (16, 16, 16), 1, 1), ("bf16", (32, 64, 32), 2, 2), ("bf16", (64, 64, 32), 4, 3),
    ("bf16", (128, 64, 32), 4, 4), ("bf16", (128, 128, 64), 8, 3), ("bf16", (64, 128, 64), 8, 4),
    ("float16", (16, 32, 32), 1, 2), ("float16", (64, 64, 64), 4, 1),
    ("float16", (64, 32, 32), 2, 3), ("float16", (128, 128, 32), 8, 2),
    ("float32", (16, 16, 16), 1, 3), ("float32", (64, 64, 32), 4, 2),
    ("float32", (32, 64, 16), 2, 4), ("float32", (128, 64, 32), 8, 3)])
def test_matmul(dtype, tile, warps, stages):
    m, n, k = 2 * tile[0], 2 * tile[1], 5 * tile[2]
    a, b = normal(m, k, dtype=dtype, seed=1), normal(k, n, dtype=dtype, seed=2)
    c = encode(np.full((m, n), np.nan), dtype)
    stats = launch(matmul_kernel, (2, 2), [a, b, c, m, n, k],
                   tile, warps, stages)
    x, y = decode(a), decode(b)
    if dtype == "float32":  # tf32 sees ten bits of the mantissa
        x, y = ((v.astype(np.float32).view(np.uint32) & ~np.uint32(0x1fff)).view(np.float32)
                .astype(np.float64) for v in (x, y))
    close(c, x @ y, dtype, units=4)
    assert sum(stats["mma"].values()) == stats["tensor"] > 0
    assert stats["global_unique_bytes_read"] == a.nbytes + b.nbytes
    assert stats["global_unique_bytes_written"] == c.nbytes
    assert stats["shared_wavefronts"] <= 1.5 * stats["shared_wavefronts_ideal"]


@pytest.mark.parametrize("dtype", ["bf16", "float16", "float32"])
def test_ragged_matmul(dtype):
    m, n, k = 77, 48, 90
    a, b = normal(m, k, dtype=dtype, seed=1), normal(k, n, dtype=dtype, seed=2)
    c = encode(np.full((m, n), np.nan), dtype)
    launch(matmul_kernel, (2, 2), [a, b, c, m, n, k], (64, 32, 32))
    close(c, decode(a) @ decode(b), dtype, units=4 if dtype != "float32" else 2.0 ** 13)


@triton.jit
def attention_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, S, BM: tl.constexpr, BN: tl.constexpr,
                     D: tl.constexpr, CAUSAL: tl.constexpr):
    head = tl.program_id(1) * S * D
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rd = tl.arange(0, D)
    q = tl.load(q_ptr + head + rm[:, None] * D + rd[None, :], mask=rm[:, None] < S, other=0.0)
    m = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    scale = 1.4426950408889634 / tl.sqrt(D * 1.0)
    end = tl.minimum(tl.program_id(0) * BM + BM, S) if CAUSAL else S
    for start in range(0, end, BN):
        rn = start + tl.arange(0, BN)
        k = tl.load(k_ptr + head + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(rn[None, :] < S, s, float("-inf"))
        if CAUSAL:
            s = tl.where(rn[None, :] <= rm[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        correction = tl.exp2(m - new)
        total = total * correction + tl.sum(p, 1)
        v = tl.load(v_ptr + head + rn[:, None] * D + rd[None, :], mask=rn[:, None] < S, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        m = new
    o = acc / total[:, None]
    tl.store(o_ptr + head + rm[:, None] * D + rd[None, :], o.to(o_ptr.dtype.element_ty),
             mask=rm[:, None] < S)
    tl.store(lse_ptr + tl.program_id(1) * S + rm, m + tl.log2(total), mask=rm < S)


@pytest.mark.parametrize("dtype, d, tile, warps, stages, causal, s", [
    ("bf16", 64, (64, 32), 4, 3, True, 128), ("bf16", 128, (64, 64), 4, 2, True, 128),
    ("float16", 64, (128, 64), 8, 4, False, 192), ("bf16", 32, (16, 16), 1, 1, True, 50),
    ("float16", 64, (32, 32), 2, 3, True, 100)])
def test_attention(dtype, d, tile, warps, stages, causal, s):
    q, k, v = (normal(2, s, d, dtype=dtype, seed=i) for i in range(3))
    o, lse = encode(np.full((2, s, d), np.nan), dtype), np.full((2, s), np.nan, np.float32)
    launch(attention_kernel, (-(-s // tile[0]), 2), [q, k, v, o, lse, s],
           (*tile, d, causal), warps, stages)
    scores = decode(q) @ decode(k).transpose(0, 2, 1) / np.sqrt(d)
    if causal:
        scores = np.where(np.tril(np.ones((s, s), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    close(o, p / p.sum(-1, keepdims=True) @ decode(v), dtype, units=2)
    expected = (scores.max(-1) + np.log(p.sum(-1))) / np.log(2)
    assert np.abs(lse - expected).max() < 1e-5


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, B)
    x = tl.load(x_ptr + row * n + c, mask=c < n, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + c, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=c < n)


@triton.jit
def layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, n, B: tl.constexpr):
    row, c = tl.program_id(0), tl.arange(0, B)
    x = tl.load(x_ptr + row * n + c, mask=c < n, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / n
    centred = tl.where(c < n, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / n + 1e-5)
    y = centred * rstd * tl.load(w_ptr + c, mask=c < n).to(tl.float32) + \
        tl.load(b_ptr + c, mask=c < n).to(tl.float32)
    tl.store(y_ptr + row * n + c, y.to(y_ptr.dtype.element_ty), mask=c < n)


@pytest.mark.parametrize("dtype", ["bf16", "float16", "float32"])
@pytest.mark.parametrize("n, warps", [(1000, 8), (64, 1), (333, 2), (4096, 4)])
def test_rows(n, warps, dtype):
    x, w, b = normal(6, n, dtype=dtype), normal(n, dtype=dtype, seed=1), normal(n, dtype=dtype)
    y = encode(np.full((6, n), np.nan), dtype)
    launch(softmax_kernel, 6, [x, y, n], [triton.next_power_of_2(n)], warps)
    e = np.exp(decode(x) - decode(x).max(-1, keepdims=True))
    close(y, e / e.sum(-1, keepdims=True), dtype, units=4 if dtype == "float32" else 1)
    launch(layer_norm_kernel, 6, [x, w, b, y, n], [triton.next_power_of_2(n)], warps)
    centred = decode(x) - decode(x).mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5)
    close(y, centred * rstd * decode(w) + decode(b), dtype, units=4 if dtype == "float32" else 1)


@triton.jit
def atomic_kernel(x_ptr, sums_ptr, most_ptr, count_ptr, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.atomic_add(sums_ptr + i % 7, x, mask=i < n)
    tl.atomic_max(most_ptr + i % 5, x, mask=i < n)
    tl.atomic_add(count_ptr, 1)
    tl.atomic_cas(count_ptr + 1, 0, tl.program_id(0) + 1)


@pytest.mark.parametrize("warps", [1, 4])
def test_atomics(warps):
    n = 1000
    x = np.random.default_rng(0).integers(-50, 50, n).astype(np.float32)
    sums, most = np.zeros(7, np.float32), np.full(5, -np.inf, np.float32)
    count = np.zeros(2, np.int32)
    launch(atomic_kernel, 8, [x, sums, most, count, n], [128], warps)
    i = np.arange(n)
    assert (sums == [x[i % 7 == j].sum() for j in range(7)]).all()
    assert (most == [x[i % 5 == j].max() for j in range(5)]).all()
    assert count[0] == 8 and 1 <= count[1] <= 8


@triton.jit
def scan_kernel(x_ptr, y_ptr, order_ptr, B: tl.constexpr):
    c = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + c)
    tl.store(y_ptr + c, tl.cumsum(x, 0))
    tl.store(order_ptr + c, tl.sort(x))


@pytest.mark.parametrize("b, warps", [(256, 4), (64, 1)])
def test_scan_and_sort(b, warps):
    x = np.random.default_rng(0).integers(-99, 99, (3, b)).astype(np.float32)
    y, order = np.zeros_like(x), np.zeros_like(x)
    launch(scan_kernel, 3, [x, y, order], [b], warps)
    assert (y == np.cumsum(x, -1)).all() and (order == np.sort(x, -1)).all()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_warps(seed):
    """Another order of blocks and warps: the same bits."""
    a, b = normal(64, 96, dtype="bf16", seed=1), normal(96, 64, dtype="bf16", seed=2)
    results = []
    for s in (0, seed + 1):
        c = encode(np.full((64, 64), np.nan), "bf16")
        launch(matmul_kernel, (1, 1), [a, b, c, 64, 64, 96],
               (64, 64, 32), seed=s)
        results.append(c)
    assert (results[0] == results[1]).all()
