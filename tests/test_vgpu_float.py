"""Each float instruction of the virtual A100 against exact rational arithmetic: every rounding,
.ftz and .sat, on special values, ties and random bits."""

import math

import numpy as np
import pytest

from ptx_forms import FLOATS, arithmetic, check, decode, encode, operands, run

SOURCES = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "rcp": 1, "sqrt": 1}
ROUNDED = [(op, kind, mode, flags) for op in SOURCES for kind in ("f32", "f64")
           for mode in ("rn", "rz", "rm", "rp")
           for flags in (("", "ftz", "sat", "ftz.sat") if kind == "f32" and mode in ("rn", "rz")
                         else ("",))
           if not ("sat" in flags and op in ("div", "rcp", "sqrt"))]


@pytest.mark.parametrize("op, kind, mode, flags", ROUNDED,
                         ids=[".".join(filter(None, (o, m, f, k))) for o, k, m, f in ROUNDED])
def test_arithmetic(op, kind, mode, flags):
    n = SOURCES[op]
    name = ".".join(filter(None, (op, mode, flags, kind)))
    arrays = operands([kind] * n, n=100)
    got = run(f"{name} d, {', '.join('abc'[:n])};", [kind] * n, kind, arrays)
    reference = arithmetic(op, kind, mode, "ftz" in flags, "sat" in flags)
    check(got, [reference(*bits) for bits in zip(*arrays)], arrays, kind, same_nan=kind == "f32")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "fma"])
def test_half_arithmetic(op, kind):
    n = SOURCES[op]
    arrays = operands([kind] * n, n=600)
    got = run(f"{op}.rn.{kind} d, {', '.join('abc'[:n])};", [kind] * n, kind, arrays)
    reference = arithmetic(op, kind)
    expected = [reference(*bits) for bits in zip(*arrays)]
    check(got, expected, arrays)
    wide = [a.astype(np.uint32) | a[::-1].astype(np.uint32) << 16 for a in arrays]
    got = run(f"{op}.rn.{kind}x2 d, {', '.join('abc'[:n])};", ["b32"] * n, "b32", wide)
    check(got & 0xffff, expected, arrays)
    check(got >> 16, expected[::-1], [a[::-1] for a in arrays])


def min_max(op, kind, nan, ftz):
    def of(a, b):
        x, y = decode(kind, a), decode(kind, b)
        if ftz:
            x, y = (math.copysign(0.0, v) if abs(v) < 2.0 ** FLOATS[kind][1] else v
                    for v in (x, y))
        if math.isnan(x) or math.isnan(y):
            if nan or (math.isnan(x) and math.isnan(y)):
                return encode(kind, math.nan)
            return encode(kind, y if math.isnan(x) else x)
        key = [(v, math.copysign(1, v)) for v in (x, y)]  # -0 is less than +0
        return encode(kind, (min(key) if op == "min" else max(key))[0])
    return of


@pytest.mark.parametrize("name", [f"{op}{flags}.{kind}" for op in ("min", "max") for flags, kinds in
                                  (("", ("f32", "f64", "f16", "bf16")), (".ftz", ("f32",)),
                                   (".NaN", ("f32", "f16", "bf16"))) for kind in kinds])
def test_min_max(name):
    op, *flags, kind = name.split(".")
    arrays = operands([kind, kind])
    got = run(f"{name} d, a, b;", [kind, kind], kind, arrays)
    reference = min_max(op, kind, "NaN" in flags, "ftz" in flags)
    check(got, [reference(*bits) for bits in zip(*arrays)], arrays, kind, same_nan=kind != "f64")


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_signs(kind):
    arrays = operands([kind])
    sign = arrays[0].dtype.type(1 << 8 * arrays[0].itemsize - 1)
    check(run(f"neg.{kind} d, a;", [kind], kind, arrays), arrays[0] ^ sign, arrays)
    check(run(f"abs.{kind} d, a;", [kind], kind, arrays), arrays[0] & ~sign, arrays)
    if kind in ("f32", "f64"):
        a, b = operands([kind, kind])
        check(run(f"copysign.{kind} d, a, b;", [kind, kind], kind, [a, b]),
              (b & ~sign) | (a & sign), [a, b])


# Error bounds of the PTX ISA: relative in 2**-n, absolute in 2**-n, in units of the last place.
APPROX = {
    "ex2.approx.f32": (np.exp2, "relative", 22), "ex2.approx.ftz.f32": (np.exp2, "relative", 22),
    "lg2.approx.f32": (np.log2, "absolute", 22), "rcp.approx.f32": (lambda x: 1 / x, "ulp", 1),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, "ulp", 1),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), "relative", 22.9),
    "rsqrt.approx.ftz.f32": (lambda x: 1 / np.sqrt(x), "relative", 22.9),
    "sqrt.approx.f32": (np.sqrt, "relative", 23), "sqrt.approx.ftz.f32": (np.sqrt, "relative", 23),
    "sin.approx.f32": (np.sin, "absolute", 20.5), "cos.approx.f32": (np.cos, "absolute", 20.5),
    "tanh.approx.f32": (np.tanh, "relative", 11),
}


def within(got, exact, measure, n):
    finite = np.isfinite(exact) & (np.abs(exact) >= 2.0 ** -126) & (np.abs(exact) < 2.0 ** 128)
    got, exact = got[finite], exact[finite]
    error = np.abs(got - exact)
    bound = {"relative": np.abs(exact) * 2.0 ** -n, "absolute": np.full_like(exact, 2.0 ** -n),
             "ulp": n * np.abs(exact) * 2.0 ** -23}[measure]
    if measure == "absolute":
        bound = np.maximum(bound, np.abs(exact) * 2.0 ** -n)
    assert (error <= bound).all()


@pytest.mark.parametrize("name", APPROX)
def test_approximation(name):
    function, measure, n = APPROX[name]
    bits = operands(["f32"], n=20000)[0]
    x = bits.view(np.float32)
    if name.startswith(("sin", "cos")):
        x = np.clip(np.nan_to_num(x, posinf=1, neginf=1), -np.pi, np.pi).astype(np.float32)
    inputs = np.where(np.abs(x) < 2.0 ** -126, np.copysign(np.float32(0), x), x) \
        if ".ftz" in name else x
    with np.errstate(all="ignore"):
        exact = function(inputs.astype(np.float64))
    got = run(f"{name} d, a;", ["f32"], "f32", [x.view(np.uint32)])
    value = got.view(np.float32).astype(np.float64)
    within(value, exact, measure, n)
    assert (got[np.isnan(exact)] == 0x7fffffff).all()
    infinite = np.isinf(exact) | (np.abs(exact) >= 2.0 ** 128)
    assert (value[infinite] == np.copysign(np.inf, exact[infinite])).all()
    zero = exact == 0
    assert (value[zero] == 0).all() and (np.signbit(value[zero]) == np.signbit(exact[zero])).all()
    if ".ftz" in name:
        assert not ((np.abs(value) > 0) & (np.abs(value) < 2.0 ** -126)).any()


@pytest.mark.parametrize("name", ["div.full.f32", "div.approx.f32", "div.approx.ftz.f32",
                                  "div.full.ftz.f32"])
def test_approximate_division(name):
    a, b = (x.view(np.float32) for x in operands(["f32", "f32"], n=5000))
    got = run(f"{name} d, a, b;", ["f32", "f32"], "f32",
              [a.view(np.uint32), b.view(np.uint32)]).view(np.float32).astype(np.float64)
    normal = (np.abs(b) >= 2.0 ** -126) & (np.abs(b) <= 2.0 ** 126) & np.isfinite(a) & \
        ((np.abs(a) >= 2.0 ** -126) | (a == 0))
    with np.errstate(all="ignore"):
        within(got[normal], a[normal].astype(np.float64) / b[normal], "ulp", 2)
    if "approx" in name:  # the quotient by a huge number is zero
        huge = (np.abs(b) > 2.0 ** 126) & np.isfinite(b) & np.isfinite(a)
        assert huge.any() and (got[huge] == 0).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("op", ["tanh", "ex2"])
def test_half_approximation(op, kind):
    bits = np.arange(65536, dtype=np.uint16)
    x = np.array([decode(kind, b) for b in bits])
    ftz = ".ftz" if (op, kind) == ("ex2", "bf16") else ""
    got = run(f"{op}.approx{ftz}.{kind} d, a;", [kind], kind, [bits])
    value = np.array([decode(kind, b) for b in got])
    with np.errstate(all="ignore"):
        exact = {"tanh": np.tanh, "ex2": np.exp2}[op](x)
    finite = np.isfinite(exact) & (np.abs(exact) > 2.0 ** FLOATS[kind][1]) & \
        (np.abs(exact) < FLOATS[kind][2])
    value, exact = value[finite], exact[finite]
    bound = 2.0 ** {("tanh", "f16"): -10.987, ("tanh", "bf16"): -8, ("ex2", "f16"): -9.9,
                    ("ex2", "bf16"): -7}[op, kind]
    assert (np.abs(value - exact) <= bound * np.abs(exact)).all()
    packed = run(f"{op}.approx{ftz}.{kind}x2 d, a;", ["b32"], "b32",
                 [bits.astype(np.uint32) | bits[::-1].astype(np.uint32) << 16])
    assert (packed & 0xffff == got).all() and (packed >> 16 == got[::-1]).all()


@pytest.mark.parametrize("name", ["rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64",
                                  "rsqrt.approx.f64"])
def test_double_approximation(name):
    """With .ftz, of the upper 32 bits only; without, to the last bits."""
    x = np.abs(np.random.default_rng(0).standard_normal(1000)) + 1e-3
    got = run(f"{name} d, a;", ["f64"], "f64", [x.view(np.uint64)])
    exact = 1 / x if name.startswith("rcp") else 1 / np.sqrt(x)
    ftz = ".ftz" in name
    assert (got & 0xffffffff == 0).all() == ftz
    assert (np.abs(got.view(np.float64) - exact) <= exact * 2.0 ** (-18 if ftz else -51)).all()


TESTS = {"finite": math.isfinite, "infinite": math.isinf, "number": lambda x: not math.isnan(x),
         "notanumber": math.isnan}


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_testp(kind):
    arrays = operands([kind])
    smallest = 2.0 ** FLOATS[kind][1]
    tests = TESTS | {"normal": lambda x: math.isfinite(x) and abs(x) >= smallest,
                     "subnormal": lambda x: 0 < abs(x) < smallest}
    for name, test in tests.items():
        got = run(f"testp.{name}.{kind} d, a;", [kind], "pred", arrays)
        check(got, [test(decode(kind, x)) for x in arrays[0]], arrays)
