"""Every cvt of the virtual A100 against exact arithmetic, and the ways to move bits."""

import math
from fractions import Fraction

import numpy as np
import pytest

from ptx_forms import (BITS, DEVICE, FLOATS, NAN, check, decode, encode, operands, rounded_integer,
                       run)
from vgpu import LoadError

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")


def value(kind, bits):
    if kind in FLOATS:
        return decode(kind, bits)
    bits = int(bits)
    return bits - (1 << BITS[kind]) if kind[0] == "s" and bits >> BITS[kind] - 1 else bits


def limits(kind):
    return ((-(1 << BITS[kind] - 1), (1 << BITS[kind] - 1) - 1) if kind[0] == "s" else
            (0, (1 << BITS[kind]) - 1))


def clamped(kind, x):
    low, high = limits(kind)
    return max(low, min(high, x)) & (1 << BITS[kind]) - 1


def convert(modifiers, to, source, reference, arrays=None):
    arrays = arrays or operands([source], n=400)
    name = ".".join(filter(None, ("cvt", modifiers, to, source)))
    got = run(f"{name} d, a;", [source], to, arrays)
    check(got, [reference(value(source, x)) for x in arrays[0]], arrays, to, to != "f64")


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("to", INTEGERS)
def test_integers(to, source):
    if to != source:
        convert("", to, source, lambda x: x & (1 << BITS[to]) - 1)
        convert("sat", to, source, lambda x: clamped(to, x))


def test_bytes():
    a = operands(["b16"])
    check(run("cvt.u16.u8 d, a;", ["b16"], "b16", a), a[0] & 255, a)
    check(run("cvt.s16.s8 d, a;", ["b16"], "b16", a), a[0].astype(np.int8).astype(np.uint16), a)
    check(run("cvt.u32.u8 d, a;", ["b16"], "b32", a), a[0] & 255, a)
    check(run("cvt.s64.s8 d, a;", ["b16"], "b64", a),
          a[0].astype(np.int8).astype(np.int64).astype(np.uint64), a)
    b = operands(["b32"])
    check(run("cvt.u16.u32 d, a;", ["b32"], "b16", b), b[0] & 0xffff, b)
    check(run("cvt.sat.u8.s32 d, a;", ["b32"], "b32", b),
          np.clip(b[0].view(np.int32), 0, 255), b)


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", INTEGERS)
def test_integer_to_float(source, to, mode):
    if to == "bf16" and mode != "rn":
        return  # not in the ISA
    convert(mode, to, source, lambda x: encode(to, Fraction(x), mode))


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
@pytest.mark.parametrize("source", ("f16", "f32", "f64"))
@pytest.mark.parametrize("to", INTEGERS)
def test_float_to_integer(to, source, mode):
    def reference(x):
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return clamped(to, limits(to)[x > 0])
        return clamped(to, rounded_integer(Fraction(x), mode))
    convert(f"{mode}i", to, source, reference)


@pytest.mark.parametrize("to, source, mode", [
    (t, s, m) for t, s in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("f32", "f64"),
                           ("bf16", "f64"))
    for m in ("rn", "rz", "rm", "rp") if t != "bf16" or m in ("rn", "rz")])
def test_narrower_float(to, source, mode):
    ties = np.arange(0, 65536, 7, dtype=np.uint64)
    halfway = [encode(source, (decode(to, x) + decode(to, x + 1)) / 2) for x in ties
               if math.isfinite(decode(to, x)) and math.isfinite(decode(to, (x + 1) & 0xffff))
               and (x + 1) & 0x7fff] if to != "f32" else []
    random = operands([source], n=1000)[0]
    arrays = [np.concatenate([random, np.array(halfway, random.dtype)])]
    convert(mode, to, source, lambda x: encode(to, x, mode), arrays)


@pytest.mark.parametrize("to, source", [("f32", "f16"), ("f64", "f16"), ("f64", "f32"),
                                        ("f32", "bf16")])
def test_wider_float(to, source):
    arrays = [np.arange(65536, dtype=np.uint16)] if BITS[source] == 16 else None
    convert("", to, source, lambda x: encode(to, x), arrays)


@pytest.mark.parametrize("mode", ("rn", "rz", "rm", "rp"))
@pytest.mark.parametrize("kind", ("f16", "f32", "f64"))
def test_to_integral_value(kind, mode):
    def reference(x):
        if not math.isfinite(x):
            return encode(kind, x)
        whole = rounded_integer(Fraction(x), mode)
        return encode(kind, Fraction(whole), negative_zero=math.copysign(1, x) < 0)
    convert(f"{mode}i", kind, kind, reference)


def test_saturation_and_flushing():
    convert("sat", "f32", "f32", lambda x: encode("f32", 0.0 if math.isnan(x) or x <= 0 else
                                                  min(x, 1.0)))
    convert("rn.sat", "f16", "f32", lambda x: encode("f16", 0.0 if math.isnan(x) or x <= 0 else
                                                     min(x, 1.0)))
    convert("ftz", "f64", "f32", lambda x: encode("f64", math.copysign(0.0, x)
                                                  if abs(x) < 2.0 ** -126 else x))
    convert("rn.ftz", "f32", "f64", lambda x: encode("f32", x, ftz=True))


@pytest.mark.parametrize("mode", ("rn", "rz"))
@pytest.mark.parametrize("relu", ("", ".relu"))
@pytest.mark.parametrize("to", ("f16", "bf16"))
def test_pairs(to, relu, mode):
    a, b = operands(["f32", "f32"])
    got = run(f"cvt.{mode}{relu}.{to}x2.f32 d, a, b;", ["f32", "f32"], "b32", [a, b])

    def reference(x):
        x = decode("f32", x)
        return encode(to, 0.0 if relu and x <= 0 else x, mode)
    check(got >> 16, [reference(x) for x in a], [a, b])
    check(got & 0xffff, [reference(x) for x in b], [a, b])
    if relu:
        got = run(f"cvt.{mode}{relu}.{to}.f32 d, a;", ["f32"], "b16", [a])
        check(got, [reference(x) for x in a], [a])


def test_tf32():
    arrays = operands(["f32"], n=2000)

    def reference(bits):
        x = decode("f32", bits)
        if math.isnan(x):
            return NAN["f32"]
        if math.isinf(x):
            return int(bits)
        if abs(x) >= 2.0 ** -126:
            quantum = Fraction(2) ** (math.frexp(x)[1] - 11)
        else:
            quantum = Fraction(2) ** -136
        return encode("f32", rounded_integer(Fraction(x) / quantum, "rna") * quantum,
                      negative_zero=x < 0 or math.copysign(1, x) < 0)
    got = run("cvt.rna.tf32.f32 d, a;", ["f32"], "b32", arrays)
    check(got, [reference(x) for x in arrays[0]], arrays)


def test_moves():
    a, b = operands(["b32", "b32"])
    wide = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    check(run("mov.b64 d, {a, b};", ["b32", "b32"], "b64", [a, b]), wide, [a, b])
    check(run("{.reg .b32 x; mov.b64 {x, d}, a;}", ["b64"], "b32", [wide]), b, [wide])
    check(run("mov.b64 {_, d}, a;", ["b64"], "b32", [wide]), b, [wide])
    check(run("{.reg .b16 x, y; mov.b32 {x, y}, a; mov.b32 d, { y , x };}", ["b32"], "b32", [a]),
          a >> 16 | a << 16, [a])
    check(run("{.reg .b16 x<4>; mov.b64 {x0, x1, x2, x3}, a; mov.b64 d, {x3, x2, x1, x0};}",
              ["b64"], "b64", [wide]),
          wide.view(np.uint16).reshape(-1, 4)[:, ::-1].copy().view(np.uint64).ravel(), [wide])
    check(run("mov.f32 d, 0f3FC00000;", ["b32"], "b32", [a]), np.full_like(a, 0x3fc00000), [a])
    check(run("mov.f64 d, 0d3FF8000000000000;", ["b32"], "b64", [a]),
          np.full_like(wide, 0x3ff8000000000000), [a])
    check(run("mov.f32 d, -1.5;", ["b32"], "b32", [a]), np.full_like(a, 0xbfc00000), [a])
    check(run("mov.b32 d, -2;", ["b32"], "b32", [a]), np.full_like(a, 0xfffffffe), [a])


def test_special_registers():
    text = """
    .version 8.8
    .target sm_80
    .address_size 64
    .visible .entry k(.param .u64 out) {
      .reg .b64 %rd<4>; .reg .b32 %r<40>;
      ld.param.u64 %rd0, [out];
      mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
      mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %nctaid.x;
      mov.u32 %r6, %ntid.x; mov.u32 %r7, %ntid.y; mov.u32 %r8, %laneid; mov.u32 %r9, %warpid;
      mov.u32 %r10, %lanemask_lt; mov.u32 %r11, %lanemask_ge; mov.u32 %r12, %lanemask_eq;
      mad.lo.u32 %r20, %r4, %r5, %r3; mad.lo.u32 %r20, %r20, 2, %r2;
      mad.lo.u32 %r20, %r20, %r7, %r1; mad.lo.u32 %r20, %r20, %r6, %r0;
      mad.wide.u32 %rd1, %r20, 52, %rd0;
    """ + "".join(f"st.global.u32 [%rd1+{4 * k}], %r{k};" for k in range(13)) + "ret; }"
    out = np.zeros((3, 2, 2, 5, 7, 13), np.uint32)  # ctaid.y ctaid.x tid.z tid.y tid.x
    DEVICE.load_ptx(text).launch("k", (2, 3), (7, 5, 2), [out])
    for index in np.ndindex(out.shape[:-1]):
        cy, cx, z, y, x = index
        thread = (z * 5 + y) * 7 + x
        lane = thread % 32
        assert out[index].tolist() == [x, y, z, cx, cy, 2, 7, 5, lane, thread // 32,
                                       (1 << lane) - 1, 0xffffffff ^ (1 << lane) - 1, 1 << lane]


@pytest.mark.parametrize("body, message", [
    ("foo.b32 d, a;", "unknown instruction"), ("add.bar.s32 d, a, a;", "unknown modifier .bar"),
    ("add.s32 d, a, zz;", "unknown register zz"), ("bra nowhere;", "unknown label nowhere"),
    ("add.s64 d, a, a;", "not of the instruction's width"), ("cvt.s32.f32 d, a;", "rounding"),
    ("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {d}, {a}, {a}, {d};", "shape"),
    ("add.s32 d, a;", "expected 3 operands"), ("ld.shared.b32 d, [p0];", "another state space")])
def test_what_is_unknown_is_refused_with_its_line(body, message):
    with pytest.raises(LoadError, match=rf"PTX line \d+: .*{message}"):
        run(body, ["b32"], "b32", [np.zeros(4, np.uint32)])
