"""What nvcc makes of the CUDA language runs on the virtual A100 and gives what numpy gives."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest

import vgpu
from vgpu.library import compile_ptx

X = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
I = np.arange(64)


@pytest.fixture(scope="module")
def module():
    return vgpu.Device(seed=2).load_ptx(compile_ptx(Path(__file__).with_name("vgpu_language.cu")))


def near(got, expected, unit):
    assert (np.abs(got - expected) <= unit * (np.abs(expected) + 1e-3)).all()


def test_functions(module):
    n, v, a = X.size, X.astype(np.float64), np.abs(X.astype(np.float64))
    ten = (X * np.float32(10)).astype(np.float64)
    erf = np.vectorize(math.erf)
    expected = [
        np.exp(v), np.log(a), np.sin((X * np.float32(100000)).astype(np.float64)), np.cos(v),
        np.tanh(v), a ** np.float32(1.7), erf(v), a ** -0.5, a ** 0.5, np.exp(v), np.log(a), v / 3,
        v / (1 + np.exp(-v)), np.fmod(v, np.float32(0.7)), np.copysign(np.floor(np.abs(ten) + 0.5),
                                                                       v),
        np.rint(ten), np.cbrt(v), np.log1p(a), np.expm1(v), np.arctan2(v, 2), 1 / v, a ** 0.5,
        2 ** v, np.log2(a), v * 8, np.minimum(v, 0.5) + np.maximum(v, -0.25), np.copysign(2, v),
        np.hypot(v, 1), 1 - erf(v)]
    y = np.zeros((len(expected), n), np.float32)
    module.launch("functions", 4, 256, [y, X, n])
    for got, reference in zip(y, expected):
        near(got, reference, 2e-6)
    a = np.abs(v)
    expected = [np.exp(v), np.log(a), a ** 0.5, v / 3.3, a ** -0.5, np.tanh(v), 1 / v]
    y = np.zeros((len(expected), n))
    module.launch("double_functions", 4, 256, [y, v, n])
    for got, reference in zip(y, expected):
        near(got, reference, 1e-15)


def test_integers(module):
    x = np.random.default_rng(0).integers(0, 2 ** 64, 64, dtype=np.uint64)
    y = np.zeros_like(x)
    module.launch("integers", 1, 64, [y, x])

    def expected(v):
        low, high, s = v % 2 ** 32, v >> 32, v - (v >> 63 << 64)
        b = v.to_bytes(8, "little")
        return (v // 12345 + v % 77 + (v * v >> 64) + low // 7 + bin(v).count("1") +
                64 - v.bit_length() + int(f"{low:032b}"[::-1], 2) +
                int.from_bytes(bytes((b[3], b[4], b[1], b[2])), "little") +
                (low & -low).bit_length() + (v << 5 >> 32) % 2 ** 32 +
                (-(s // 17) if s >= 0 else -s // 17)) % 2 ** 64
    assert y.tolist() == [expected(int(v)) for v in x]


def test_control_and_memory(module):
    y = np.zeros(64, np.float32)
    arguments = struct.pack("<3qf5i", 1, 2, 3, 2.5, 10, 20, 30, 40, 50)
    module.launch("struct_by_value", 1, 64, [y, X, arguments, 4])
    near(y, X[:64] * 2.5 + 2 + (I % 5 + 1) * 10, 1e-6)
    x, z = np.random.default_rng(0).integers(-1, 8, 64).astype(np.int32), np.zeros(64, np.int32)
    module.launch("switch_statement", 1, 64, [z, x])
    cases = {0: lambda i: 5, 1: lambda i: 7, 2: lambda i: i, 3: lambda i: -1, 4: lambda i: i * i,
             5: lambda i: 1 << i % 31}
    assert z.tolist() == [cases.get(int(v), lambda i: 99)(i) for i, v in enumerate(x)]
    module.launch("local_array", 1, 64, [z, x])
    for i in range(64):
        a = [1000 if k == x[i] % 16 else 3 * k for k in range(16)]
        assert z[i] == sum(a[(k + i) % 16] * (k + 1) for k in range(16))
    with pytest.raises(vgpu.Fault, match="of local memory, but a thread has 64 bytes"):
        module.launch("local_array_too_far", 1, 64, [z, x])


def test_device_functions(module):
    table = np.random.default_rng(0).integers(0, 8, 64).astype(np.int32)
    first, second = np.zeros(64, np.int64), np.zeros(64, np.float32)
    module.launch("calls", 1, 64, [first, second, table])

    def both(p, i):
        a, b = p
        return {0: (a + 5, b), 1: (a, b * b), 2: (a * 7, b), 3: (i, 0.5), 4: (a, b + 1),
                5: (a - 3, b)}.get(int(table[i]), (a, -b ** 3))
    for i in range(64):
        p = (i, i * 0.25)
        p = both(both(p, i) if i % 3 else p, 63 - i)
        assert first[i] == p[0]
        near(second[i], p[1], 1e-6)
    x, y = X[:64].astype(np.float64), np.zeros(64)
    module.launch("double_power", 1, 64, [y, x])
    near(y, np.abs(x) ** 1.3, 1e-15)


def test_constants_and_assert(module):
    y = np.zeros(64, np.float32)
    module.launch("constants", 1, 64, [y, 1.0])
    assert (y == I % 4 + 1).all()
    with pytest.raises(vgpu.Fault, match="an assertion failed"):
        module.launch("constants", 1, 64, [y, 1.5])


def test_cooperative_groups(module):
    y = np.zeros(64, np.int32)
    module.launch("groups", 1, 64, [y])
    assert (y == 49600 + (I % 32 ^ 1) + (I % 32 // 8 == 0)).all()


def test_half_intrinsics(module):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 2)).astype(np.float16)
    w = (rng.standard_normal((32, 2)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    y, z = np.zeros((128, 2), np.float16), np.zeros((128, 2), np.uint16)
    module.launch("halves", 1, 32, [y, z, x, w])
    h, b = x.astype(np.float64), (w.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    near(y, np.concatenate([h * h + 0.5, np.exp(h), np.abs(h), h / 3]), 2.0 ** -10)
    near((z.astype(np.uint32) << 16).view(np.float32),
         np.concatenate([b * b, b + b, b - [1, 2], 1 / b]), 2.0 ** -8)


@pytest.mark.parametrize("grid, block, shared, message", [
    (1, 2048, 0, "expected 1 to 1024 threads per block"), (0, 32, 0, "a grid that the hardware"),
    ((1, 70000), 32, 0, "a grid that the hardware"),
    (1, 32, 170_000, "expected at most 166912 bytes of shared memory")])
def test_what_a_driver_refuses(module, grid, block, shared, message):
    with pytest.raises(ValueError, match=message):
        module.launch("groups", grid, block, [np.zeros(64, np.int32)], shared)
    with pytest.raises(ValueError, match="expected at most the 64 threads of its launch bounds"):
        module.launch("bounded", 1, 96, [np.zeros(96, np.int32)])
    with pytest.raises(ValueError, match="expected 1 arguments, got 2"):
        module.launch("groups", 1, 64, [None, None])
