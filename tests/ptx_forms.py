"""Runs one PTX instruction on many values, and computes what it must give in exact arithmetic.

Values are bit patterns throughout: arrays of uint16, uint32 or uint64."""

import itertools
import math
from fractions import Fraction

import numpy as np

from vgpu import Device

BITS = {"b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
        "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
        "pred": 32}
UINT = {16: np.uint16, 32: np.uint32, 64: np.uint64}
# Significant bits, smallest exponent, largest finite value.
FLOATS = {"f16": (11, -14, 65504.0), "bf16": (8, -126, float.fromhex("0x1.fep127")),
          "f32": (24, -126, float.fromhex("0x1.fffffep127")),
          "f64": (53, -1022, float.fromhex("0x1.fffffffffffffp1023"))}
NAN = {"f16": 0x7fff, "bf16": 0x7fff, "f32": 0x7fffffff, "f64": 0x7ff8000000000000}
DEVICE = Device(seed=1)
HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"


def run(body, inputs, output, arrays):
    """The instruction(s) `body` on registers a, b, c, ... of the types `inputs`, giving d of type
    `output` for every element of the arrays. A predicate result comes back as 0 or 1."""
    n = len(arrays[0]) if arrays else 64
    lines, params = [], []
    for i, kind in enumerate([*inputs, output]):
        bits, name = BITS[kind], "abcefg"[i] if i < len(inputs) else "d"
        params.append(f".param .u64 p{i}")
        lines += [f".reg .{'pred' if kind == 'pred' else f'b{bits}'} {name};",
                  f"ld.param.u64 %rd{i}, [p{i}];",
                  f"mad.wide.u32 %rd{i}, %i, {bits // 8}, %rd{i};"]
        if i < len(inputs):
            lines.append(f"ld.global.b{bits} {name}, [%rd{i}];" if kind != "pred" else
                         f"ld.global.b32 %x, [%rd{i}]; setp.ne.u32 {name}, %x, 0;")
    last = len(inputs)
    store = (f"selp.b32 %x, 1, 0, d; st.global.b32 [%rd{last}], %x;" if output == "pred" else
             f"st.global.b{BITS[output]} [%rd{last}], d;")
    text = "\n".join([
        HEADER,
        f".visible .entry k({', '.join(params)}, .param .u32 n) {{",
        ".reg .b64 %rd<8>; .reg .b32 %i, %x, %t, %n; .reg .pred %p, q; .reg .b32 %y<8>;",
        "mov.u32 %i, %ctaid.x; mov.u32 %t, %tid.x; mad.lo.u32 %i, %i, 128, %t;",
        "ld.param.u32 %n, [n]; min.u32 %i, %i, %n;",
        *lines, body, store, "ret;", "}"])
    padded = -(-n // 128) * 128  # every lane works: the vector path of the engine
    ins = [np.concatenate([a, np.repeat(a[-1:], padded - n)]) for a in
           (np.ascontiguousarray(x).astype(UINT[BITS[k]], copy=False)
            for x, k in zip(arrays, inputs))]
    out = np.zeros(padded, UINT[BITS[output]])
    DEVICE.load_ptx(text).launch("k", padded // 128, 128, [*ins, out, padded - 1])
    return out[:n]


def kernel(body, args, grid=1, block=32, device=DEVICE, shared=0, declarations=""):
    """Runs a kernel whose parameters are 64-bit, in %p0, %p1, ...; %t is the thread."""
    params = ", ".join(f".param .u64 a{i}" for i in range(len(args)))
    loads = "".join(f"ld.param.u64 %p{i}, [a{i}];" for i in range(len(args)))
    text = (HEADER + declarations + f".visible .entry k({params}) {{ .reg .b64 %p<8>, %q<8>; "
            ".reg .b32 %r<40>, %t; .reg .f32 %f<20>; .reg .b16 %h<20>; .reg .f64 %d<8>; "
            ".reg .pred %c<8>; mov.u32 %t, %tid.x;" + loads + body + "\nret; }")
    return device.load_ptx(text).launch("k", grid, block, args, shared)


def values(kind, rng, n):
    """Edge cases of a type, then random bits, then random numbers of moderate size."""
    bits = BITS[kind]
    one = 1 << bits - 1
    if kind in FLOATS:
        mantissa = FLOATS[kind][0] - 1
        top = (one - 1) >> mantissa << mantissa  # infinity
        bias = (one >> mantissa) // 2 - 1
        edges = [0, 1, 2, (1 << mantissa) - 1, 1 << mantissa, (1 << mantissa) + 1, top - 1, top,
                 top | 1 << mantissa - 1, top + 1, *(e << mantissa for e in
                 (bias - 1, bias, bias + 1, bias + mantissa)), (bias << mantissa) + 1,
                 (bias + 3 << mantissa) | 5]
        edges += [e | one for e in edges]
        near = rng.integers(bias - 8, bias + 9, n).astype(np.uint64) << np.uint64(mantissa)
        near |= rng.integers(0, 1 << mantissa, n, dtype=np.uint64)
        near |= rng.integers(0, 2, n).astype(np.uint64) << np.uint64(bits - 1)
    else:
        edges = [0, 1, 2, 3, 7, 31, 32, 33, one - 1, one, one + 1, 2 * one - 1, 2 * one - 2]
        near = rng.integers(0, 70, n).astype(np.uint64)
    anything = rng.integers(0, 2 * one - 1, n, dtype=np.uint64, endpoint=True)
    together = np.concatenate([np.array(edges, np.uint64), anything, near])
    return together.astype(UINT[bits]), len(edges)


def operands(kinds, seed=0, n=200):
    """Arrays for the operands: every combination of edge cases (of the first two), then random."""
    rng = np.random.default_rng(seed)
    drawn = [values(k, rng, n) for k in kinds]
    if len(kinds) == 1:
        return [drawn[0][0]]
    pairs = list(itertools.product(range(drawn[0][1]), range(drawn[1][1])))
    columns = []
    for j, (array, edges) in enumerate(drawn):
        head = (np.array([p[j] for p in pairs]) if j < 2 else
                rng.integers(0, edges, len(pairs)))
        columns.append(np.concatenate([array[head], array[edges:]]))
    return columns


def decode(kind, bits):
    """A Python float, exact."""
    bits = int(bits)
    if kind == "f64":
        return float(np.uint64(bits).view(np.float64))
    if kind == "f32":
        return float(np.uint32(bits).view(np.float32))
    if kind == "f16":
        return float(np.uint16(bits).view(np.float16))
    return float(np.uint32(bits << 16).view(np.float32))


def rounded_integer(x, mode):
    low = math.floor(x)
    if x == low:
        return low
    if mode == "rn":
        half = x - low - Fraction(1, 2)
        return low + (half > 0 or (half == 0 and low % 2))
    if mode == "rna":
        return low + (abs(x - low) >= Fraction(1, 2) if x > 0 else x - low > Fraction(1, 2))
    return low if mode == "rm" or (mode == "rz" and x > 0) else low + 1


def encode(kind, x, mode="rn", ftz=False, negative_zero=False):
    """Bits of a Fraction or float rounded once to the format; NaN gives the canonical one."""
    bits, (mantissa, smallest, largest) = BITS[kind], FLOATS[kind]
    sign = 1 << bits - 1
    infinity = (sign - 1) >> mantissa - 1 << mantissa - 1
    if isinstance(x, float) and not math.isfinite(x):
        return NAN[kind] if math.isnan(x) else infinity | (sign if x < 0 else 0)
    if x == 0:
        negative = negative_zero or (isinstance(x, float) and math.copysign(1, x) < 0)
        return sign if negative else 0
    x = Fraction(x)
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    quantum = max(exponent, smallest) - mantissa + 1
    count = abs(rounded_integer(x / Fraction(2) ** quantum, mode))
    if count * Fraction(2) ** quantum > Fraction(largest):
        inward = mode == "rz" or mode == ("rm" if x > 0 else "rp")
        result = infinity - 1 if inward else infinity
    elif quantum == smallest - mantissa + 1:
        result = count  # a subnormal, or the first binade
    else:
        result = count + ((quantum - (smallest - mantissa + 1)) << mantissa - 1)
    if ftz and result < 1 << mantissa - 1:
        result = 0
    return result | (sign if x < 0 else 0)


def square_root(x):
    """Close enough to the square root of a Fraction for every rounding to be right."""
    shift = 700
    scaled = (x.numerator << 2 * shift) // x.denominator
    root = math.isqrt(scaled)
    exact = root * root == scaled and (x.numerator << 2 * shift) % x.denominator == 0
    return Fraction(root, 1 << shift) if exact else Fraction(2 * root + 1, 1 << shift + 1)


def special(operation, xs):
    """The result where an operand is no finite number or the result is zero or infinite."""
    with np.errstate(all="ignore"):
        v = [np.float64(x) for x in xs]
        return float({"add": lambda: v[0] + v[1], "sub": lambda: v[0] - v[1],
                      "mul": lambda: v[0] * v[1], "div": lambda: v[0] / v[1],
                      "fma": lambda: (v[2] if np.isfinite(v[:2]).all() else v[0] * v[1] + v[2]),
                      "rcp": lambda: 1 / v[0],
                      "sqrt": lambda: np.sqrt(v[0])}[operation]())


EXACT = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
         "div": lambda a, b: a / b, "fma": lambda a, b, c: a * b + c, "rcp": lambda a: 1 / a,
         "sqrt": square_root}


def arithmetic(operation, kind, mode="rn", ftz=False, sat=False):
    """The bits that an operation gives, rounded once, as a function of the operands' bits."""
    def flushed(x):
        return math.copysign(0.0, x) if ftz and abs(x) < 2.0 ** FLOATS[kind][1] else x

    def of(*bits):
        xs = [flushed(decode(kind, b)) for b in bits]
        pole = {"div": lambda: xs[1] == 0, "rcp": lambda: xs[0] == 0,
                "sqrt": lambda: xs[0] <= 0}.get(operation, lambda: False)()
        if not all(map(math.isfinite, xs)) or pole:
            exact = special(operation, xs)
            negative_zero = exact == 0 and math.copysign(1, exact) < 0
        else:
            exact = EXACT[operation](*map(Fraction, xs))
            negative_zero = False
            if exact == 0:
                same = {"add": lambda: (xs[0], xs[1]), "sub": lambda: (xs[0], -xs[1]),
                        "fma": lambda: (math.copysign(0.0, xs[0]) * math.copysign(1, xs[1])
                                        if xs[0] * xs[1] == 0 and 0 in xs[:2] else 1.0,
                                        xs[2])}.get(operation)
                if same:
                    s, t = (math.copysign(1, v) for v in same())
                    both_zero = all(v == 0 for v in same())
                    negative_zero = (s < 0 and t < 0) if both_zero and s == t else mode == "rm"
                else:
                    negative_zero = math.copysign(1, special(operation, xs)) < 0
        if sat:
            if isinstance(exact, float) and math.isnan(exact):
                return 0
            exact = min(max(exact, 0), 1)
            negative_zero = False
        return encode(kind, exact, mode, ftz, negative_zero)
    return of


def check(got, expected, arrays, kind=None, same_nan=True):
    """Equal bits; NaNs of any payload are alike unless same_nan."""
    expected = np.array([int(x) for x in expected], dtype=got.dtype)
    different = got != expected
    if kind in FLOATS and not same_nan:
        nans = np.array([math.isnan(decode(kind, x)) for x in expected])
        different &= ~(nans & np.array([math.isnan(decode(kind, x)) for x in got]))
    if different.any():
        i = int(np.argmax(different))
        raise AssertionError(
            f"{int(different.sum())} of {len(got)} differ, first for operands "
            f"{[hex(int(a[i])) for a in arrays]}: got {int(got[i]):#x}, expected "
            f"{int(expected[i]):#x}")
