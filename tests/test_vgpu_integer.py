"""Each integer, bit, comparison and selection instruction of the virtual A100 against Python's
integers, on edge cases and random bits."""

import math
import operator

import numpy as np
import pytest

from ptx_forms import BITS, check, decode, operands, run
from vgpu import Fault


def signed(kind, x):
    x, bits = int(x), BITS[kind]
    return x - (1 << bits) if kind[0] == "s" and x >> bits - 1 else x


def clamp(x, low, high):
    return max(low, min(high, x))


def quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
TWO = {"add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
       "div": quotient, "rem": lambda a, b: a - b * quotient(a, b)}


def compare(name, kinds, result, reference, arrays):
    body = f"{name} d, {', '.join('abce'[:len(kinds)])};"
    got = run(body, kinds, result, arrays)
    mask = (1 << BITS[result]) - 1
    check(got, [reference(*(signed(k, x) for k, x in zip(kinds, row))) & mask
                for row in zip(*arrays)], arrays)


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("op", TWO)
def test_two_operands(op, kind):
    a, b = operands([kind, kind])
    if op in ("div", "rem"):
        a, b = a[b != 0], b[b != 0]
    compare(f"{op}.{kind}", [kind, kind], kind, TWO[op], [a, b])


@pytest.mark.parametrize("kind", INTEGERS)
def test_products(kind):
    bits = BITS[kind]
    two = operands([kind, kind])
    compare(f"mul.hi.{kind}", [kind] * 2, kind, lambda a, b: a * b >> bits, two)
    three = operands([kind] * 3)
    compare(f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c: a * b + c, three)
    compare(f"mad.hi.{kind}", [kind] * 3, kind, lambda a, b, c: (a * b >> bits) + c, three)
    compare(f"sad.{kind}", [kind] * 3, kind, lambda a, b, c: abs(a - b) + c, three)
    if bits < 64:
        wide = f"{kind[0]}{2 * bits}"
        compare(f"mul.wide.{kind}", [kind] * 2, wide, operator.mul, two)
        compare(f"mad.wide.{kind}", [kind, kind, wide], wide, lambda a, b, c: a * b + c,
                operands([kind, kind, wide]))


@pytest.mark.parametrize("kind", ("s16", "s32", "s64"))
def test_one_operand(kind):
    compare(f"neg.{kind}", [kind], kind, operator.neg, operands([kind]))
    compare(f"abs.{kind}", [kind], kind, abs, operands([kind]))


def test_saturated_sums():
    low, high = -2 ** 31, 2 ** 31 - 1
    two = operands(["s32", "s32"])
    compare("add.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a + b, low, high), two)
    compare("sub.sat.s32", ["s32"] * 2, "s32", lambda a, b: clamp(a - b, low, high), two)


def test_division_by_zero_is_a_fault():
    with pytest.raises(Fault, match="divides an integer by zero"):
        run("div.s32 d, a, 0;", ["s32"], "s32", [np.arange(4, dtype=np.uint32)])


def test_carry_chains():
    """128-bit sums, differences and a 64-bit product out of 32-bit pieces."""
    a, b = operands(["u64", "u64"])
    halves = ("{.reg .b32 al, ah, bl, bh, rl, rh; mov.b64 {al, ah}, a; mov.b64 {bl, bh}, b; %s "
              "mov.b64 d, {rl, rh};}")
    for body, reference in (
            ("add.cc.u32 rl, al, bl; addc.u32 rh, ah, bh;", lambda x, y: x + y),
            ("sub.cc.u32 rl, al, bl; subc.u32 rh, ah, bh;", lambda x, y: x - y),
            ("mul.lo.u32 rl, al, bl; mul.hi.u32 rh, al, bl; mad.lo.cc.u32 rl, ah, 0, rl; "
             "madc.lo.u32 rh, ah, bl, rh; mad.lo.u32 rh, al, bh, rh;", lambda x, y: x * y)):
        got = run(halves % body, ["u64", "u64"], "u64", [a, b])
        check(got, [reference(int(x), int(y)) % 2 ** 64 for x, y in zip(a, b)], [a, b])


@pytest.mark.parametrize("kind", ("b16", "b32", "b64"))
def test_logic(kind):
    two = operands([kind, kind])
    for op, reference in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        compare(f"{op}.{kind}", [kind] * 2, kind, reference, two)
    compare(f"not.{kind}", [kind], kind, operator.invert, operands([kind]))
    compare(f"cnot.{kind}", [kind], kind, lambda a: a == 0, operands([kind]))


@pytest.mark.parametrize("kind", ("b16", "b32", "b64"))
def test_shifts(kind):
    bits = BITS[kind]
    arrays = operands([kind, "u32"])
    compare(f"shl.{kind}", [kind, "u32"], kind, lambda a, n: a << n if n < bits else 0, arrays)
    for to in ("u", "s"):
        shifted = f"{to}{bits}"
        compare(f"shr.{shifted}", [shifted, "u32"], shifted, lambda a, n: a >> min(n, bits),
                arrays)


def test_funnel_shifts():
    arrays = operands(["b32", "b32", "u32"])
    for direction in "lr":
        for mode in ("clamp", "wrap"):
            def reference(a, b, n):
                n = min(n, 32) if mode == "clamp" else n & 31
                return (b << 32 | a) << n >> 32 if direction == "l" else (b << 32 | a) >> n
            compare(f"shf.{direction}.{mode}.b32", ["b32", "b32", "u32"], "b32", reference, arrays)


@pytest.mark.parametrize("table", [0x00, 0x80, 0xfe, 0x96, 0xe8, 0xca, 0x1b, 0xff])
def test_lop3(table):
    arrays = operands(["b32"] * 3)
    got = run(f"lop3.b32 d, a, b, c, {table};", ["b32"] * 3, "b32", arrays)
    expected = [sum(((table >> ((int(a) >> k & 1) << 2 | (int(b) >> k & 1) << 1 |
                                (int(c) >> k & 1)) & 1) << k) for k in range(32))
                for a, b, c in zip(*arrays)]
    check(got, expected, arrays)


MODES = {"f4e": ("0123", "1234", "2345", "3456"), "b4e": ("0765", "1076", "2107", "3210"),
         "rc8": ("0000", "1111", "2222", "3333"), "ecl": ("0123", "1123", "2223", "3333"),
         "ecr": ("0000", "0111", "0122", "0123"), "rc16": ("0101", "2323", "0101", "2323")}


@pytest.mark.parametrize("mode", ["", *MODES])
def test_prmt(mode):
    arrays = operands(["b32"] * 3)

    def reference(a, b, c):
        source = (b << 32 | a).to_bytes(8, "little")
        if mode:
            return int.from_bytes(bytes(source[int(k)] for k in MODES[mode][c & 3]), "little")
        out = []
        for k in range(4):
            byte = source[c >> 4 * k & 7]
            out.append((255 if byte & 128 else 0) if c >> 4 * k & 8 else byte)
        return int.from_bytes(bytes(out), "little")
    name = f"prmt.b32.{mode}" if mode else "prmt.b32"
    compare(name, ["b32"] * 3, "b32", reference, arrays)


@pytest.mark.parametrize("kind", ("u32", "s32", "u64", "s64"))
def test_bit_fields(kind):
    bits = BITS[kind]
    arrays = operands([kind, "u32", "u32"])

    def extract(a, position, length):  # the ISA's own pseudocode
        position, length = position & 255, length & 255
        if kind[0] == "u" or length == 0:
            sign = 0
        else:
            sign = a >> min(position + length - 1, bits - 1) & 1
        a &= (1 << bits) - 1
        out = 0
        for k in range(bits):
            inside = k < length and position + k < bits
            out |= (a >> position + k & 1 if inside else sign) << k
        return out
    compare(f"bfe.{kind}", [kind, "u32", "u32"], kind, extract, arrays)
    if kind[0] == "u":
        def insert(a, b, position, length):
            position, length = position & 255, length & 255
            for k in range(min(length, max(bits - position, 0))):
                b = b & ~(1 << position + k) | (a >> k & 1) << position + k
            return b
        unsigned = f"b{bits}"
        compare(f"bfi.{unsigned}", [unsigned, unsigned, "u32", "u32"], unsigned, insert,
                operands([unsigned, unsigned, "u32", "u32"]))


@pytest.mark.parametrize("bits", (32, 64))
def test_counting(bits):
    kind = f"b{bits}"
    a = operands([kind])
    compare(f"popc.{kind}", [kind], "u32", lambda x: bin(x).count("1"), a)
    compare(f"clz.{kind}", [kind], "u32", lambda x: bits - x.bit_length(), a)
    compare(f"brev.{kind}", [kind], kind, lambda x: int(f"{x:0{bits}b}"[::-1], 2), a)
    for sign in "us":
        def find(x):
            x = ~x if x < 0 else x
            return x.bit_length() - 1
        compare(f"bfind.{sign}{bits}", [f"{sign}{bits}"], "u32", find, a)
        compare(f"bfind.shiftamt.{sign}{bits}", [f"{sign}{bits}"], "u32",
                lambda x: bits - 1 - find(x) if find(x) >= 0 else -1, a)


ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
           "gt": operator.gt, "ge": operator.ge}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


@pytest.mark.parametrize("kind", INTEGERS)
def test_integer_comparisons(kind):
    arrays = operands([kind, kind], n=50)
    arrays[1][::3] = arrays[0][::3]
    for name, reference in {**ORDERED, **(UNSIGNED if kind[0] == "u" else {})}.items():
        compare(f"setp.{name}.{kind}", [kind, kind], "pred", reference, arrays)


def float_comparison(name):
    unordered = name in ("equ", "neu", "ltu", "leu", "gtu", "geu")
    base = {"num": lambda a, b: True, "nan": lambda a, b: False}.get(name) or \
        ORDERED[name[:2]]

    def of(a, b):
        return (unordered or name == "nan") if math.isnan(a) or math.isnan(b) else base(a, b)
    return of


@pytest.mark.parametrize("kind", ("f32", "f64", "f16", "bf16"))
def test_float_comparisons(kind):
    arrays = operands([kind, kind], n=50)
    arrays[1][::3] = arrays[0][::3]
    for name in (*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"):
        reference = float_comparison(name)
        expected = [reference(decode(kind, a), decode(kind, b)) for a, b in zip(*arrays)]
        check(run(f"setp.{name}.{kind} d, a, b;", [kind, kind], "pred", arrays), expected, arrays)
        if kind == "f32":
            check(run(f"set.{name}.u32.f32 d, a, b;", ["f32"] * 2, "u32", arrays),
                  [0xffffffff * e for e in expected], arrays)
            check(run(f"set.{name}.f32.f32 d, a, b;", ["f32"] * 2, "f32", arrays),
                  [0x3f800000 * e for e in expected], arrays)
            flushed = [float_comparison(name)(*(0.0 if abs(x) < 2.0 ** -126 else x
                                                for x in (decode(kind, a), decode(kind, b))))
                       for a, b in zip(*arrays)]
            check(run(f"setp.{name}.ftz.f32 d, a, b;", ["f32"] * 2, "pred", arrays), flushed,
                  arrays)


@pytest.mark.parametrize("kind", ("f16", "bf16"))
def test_packed_comparison(kind):
    a, b = operands([kind, kind], n=50)
    pairs = [x.astype(np.uint32) | x[::-1].astype(np.uint32) << 16 for x in (a, b)]
    got = run(f"setp.lt.{kind}x2 d|q, a, b; selp.b32 %x, 2, 0, q; selp.b32 %y0, 1, 0, d; "
              "or.b32 %x, %x, %y0; setp.eq.u32 d, %x, 3;", ["b32", "b32"], "pred", pairs)
    less = [decode(kind, x) < decode(kind, y) for x, y in zip(a, b)]
    check(got, [x and y for x, y in zip(less, less[::-1])], pairs)
    for to, yes in (("u32", 0xffff), (f"{kind}x2", {"f16": 0x3c00, "bf16": 0x3f80}[kind])):
        got = run(f"set.lt.{to}.{kind}x2 d, a, b;", ["b32", "b32"], "b32", pairs)
        check(got, [x * yes | y * yes << 16 for x, y in zip(less, less[::-1])], pairs)


@pytest.mark.parametrize("op", ("and", "or", "xor"))
def test_combined_comparison(op):
    a, b, c = operands(["s32", "s32", "pred"])
    c = c & np.uint32(1)
    function = getattr(operator, op + ("_" if op != "xor" else ""))
    for negated in ("", "!"):
        third = [bool(z) != bool(negated) for z in c]
        less = [signed("s32", x) < signed("s32", y) for x, y in zip(a, b)]
        got = run(f"setp.lt.{op}.s32 d|q, a, b, {negated}c;", ["s32", "s32", "pred"], "pred",
                  [a, b, c])
        check(got, [function(x, y) for x, y in zip(less, third)], [a, b, c])
        got = run(f"setp.lt.{op}.s32 q|d, a, b, {negated}c;", ["s32", "s32", "pred"], "pred",
                  [a, b, c])
        check(got, [function(not x, y) for x, y in zip(less, third)], [a, b, c])


@pytest.mark.parametrize("kind", ("b16", "b32", "b64", "f32", "f64"))
def test_selections(kind):
    a, b, p = operands([kind, kind, "pred"])
    p = p & np.uint32(1)
    got = run(f"selp.{kind} d, a, b, c;", [kind, kind, "pred"], kind, [a, b, p])
    check(got, np.where(p != 0, a, b), [a, b, p])
    if kind in ("b32", "b64"):
        a, b, c = operands([kind, kind, "s32"])
        got = run(f"slct.{kind}.s32 d, a, b, c;", [kind, kind, "s32"], kind, [a, b, c])
        check(got, np.where(c.view(np.int32) >= 0, a, b), [a, b, c])
        a, b, c = operands([kind, kind, "f32"])
        got = run(f"slct.{kind}.f32 d, a, b, c;", [kind, kind, "f32"], kind, [a, b, c])
        check(got, np.where(c.view(np.float32) >= 0, a, b), [a, b, c])


def test_predicate_logic():
    a, b = (x & np.uint32(1) for x in operands(["pred", "pred"]))
    for op, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        check(run(f"{op}.pred d, a, b;", ["pred"] * 2, "pred", [a, b]), function(a, b), [a, b])
    check(run("not.pred d, a;", ["pred"], "pred", [a]), a ^ 1, [a])
    check(run("mov.pred d, a;", ["pred"], "pred", [a]), a, [a])
    check(run("mov.pred d, 1; @a mov.pred d, 0;", ["pred"], "pred", [a]), a ^ 1, [a])
    check(run("mov.pred d, 1; @!a mov.pred d, 0;", ["pred"], "pred", [a]), a, [a])
