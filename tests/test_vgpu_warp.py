"""Instructions of the virtual A100 that lanes execute together or that touch memory: shuffles,
votes, reductions, barriers, mma, ldmatrix, cp.async, loads and stores, atomics, control flow."""

import numpy as np
import pytest

from ptx_forms import DEVICE, decode, encode, operands, run
from vgpu import Device

HEADER = ".version 8.8\n.target sm_80\n.address_size 64\n"
LANES = np.arange(32, dtype=np.uint32)


def kernel(body, args, grid=1, block=32, device=DEVICE, shared=0, declarations=""):
    """Runs a kernel whose parameters are 64-bit, in %p0, %p1, ...; %t is the thread."""
    params = ", ".join(f".param .u64 a{i}" for i in range(len(args)))
    loads = "".join(f"ld.param.u64 %p{i}, [a{i}];" for i in range(len(args)))
    text = (HEADER + declarations + f".visible .entry k({params}) {{ .reg .b64 %p<8>, %q<8>; "
            ".reg .b32 %r<40>, %t; .reg .f32 %f<20>; .reg .b16 %h<20>; .reg .f64 %d<8>; "
            ".reg .pred %c<8>; mov.u32 %t, %tid.x;" + loads + body + "\nret; }")
    return device.load_ptx(text).launch("k", grid, block, args, shared)


@pytest.mark.parametrize("c", [0x1f, 0x0, 0x1c03, 0x181f, 0x101f, 0x1e1f, 0x0f])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode, c):
    rng = np.random.default_rng(0)
    for offset in (0, 1, 3, 16, 31):
        value = rng.integers(0, 2 ** 32, 32, dtype=np.uint32)
        body = (f"{{.reg .pred p; shfl.sync.{mode}.b32 d|p, a, {offset}, {c}, 0xffffffff;"
                "selp.b32 %x, 0x80000000, 0, p; and.b32 d, d, 0x7fffffff; or.b32 d, d, %x;}")
        got = run(body, ["b32"], "b32", [np.tile(value, 4)])[:32]
        clamp, segment = c & 31, c >> 8 & 31
        for lane in range(32):  # the ISA's own pseudocode
            most = lane & segment | clamp & ~segment & 31
            least = lane & segment
            j = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset,
                 "idx": least | offset & ~segment & 31}[mode]
            valid = j >= most if mode == "up" else j <= most
            source = j if valid else lane
            assert got[lane] == (int(value[source]) & 0x7fffffff | valid << 31), (lane, offset)


def test_votes():
    for pattern in (0, 0xffffffff, 0x80000001, 0x0000ffff):
        p = np.tile(pattern >> LANES & 1, 4).astype(np.uint32)
        for vote, expected in (("all", pattern == 0xffffffff), ("any", pattern != 0),
                               ("uni", pattern in (0, 0xffffffff))):
            assert (run(f"vote.sync.{vote}.pred d, a, -1;", ["pred"], "pred", [p]) == expected).all()
        assert (run("vote.sync.ballot.b32 d, a, -1;", ["pred"], "b32", [p]) == pattern).all()
        assert (run("vote.sync.ballot.b32 d, !a, -1;", ["pred"], "b32", [p]) ==
                pattern ^ 0xffffffff).all()
    half = "setp.lt.u32 q, %laneid, 16; mov.b32 d, 0; @q activemask.b32 d;"
    assert (run(half, ["b32"], "b32", [np.zeros(32, np.uint32)]) == np.where(LANES < 16, 0xffff, 0)
            ).all()


def test_match():
    value = np.tile(np.array([3, 3, 7, 3, 7, 9, 9, 9], np.uint32), 16)
    got = run("match.any.sync.b32 d, a, -1;", ["b32"], "b32", [value])
    expected = [sum(1 << j for j in range(32) if value[j] == value[i]) for i in range(32)]
    assert got[:32].tolist() == expected
    got = run("match.all.sync.b32 d|q, a, -1;", ["b32"], "b32", [value])
    assert (got == 0).all()
    got = run("match.all.sync.b64 d|q, a, -1;", ["b64"], "b32", [np.full(32, 5, np.uint64)])
    assert (got == 0xffffffff).all()


@pytest.mark.parametrize("op, kind, function", [
    ("add", "u32", np.add), ("add", "s32", np.add), ("min", "u32", np.minimum),
    ("min", "s32", np.minimum), ("max", "u32", np.maximum), ("max", "s32", np.maximum),
    ("and", "b32", np.bitwise_and), ("or", "b32", np.bitwise_or), ("xor", "b32", np.bitwise_xor)])
def test_redux(op, kind, function):
    value = np.random.default_rng(0).integers(0, 2 ** 32, 32, dtype=np.uint32)
    typed = value.view(np.int32) if kind == "s32" else value
    got = run(f"redux.sync.{op}.{kind} d, a, -1;", ["b32"], "b32", [np.tile(value, 4)])
    assert (got == function.reduce(typed, dtype=typed.dtype).view(np.uint32)).all()


def fragment(matrix, rows, columns):
    """[register][lane] of a matrix in 8x8 (16-bit) tiles: rows first, then columns."""
    tiles = [matrix[8 * r:8 * r + 8, 8 * c:8 * c + 8] for c in range(columns) for r in range(rows)]
    return np.stack([np.ascontiguousarray(t).reshape(32, 2).view(np.uint32).ravel() for t in tiles])


MMA = [("m16n8k16", "f32", "bf16"), ("m16n8k16", "f32", "f16"), ("m16n8k16", "f16", "f16"),
       ("m16n8k8", "f32", "bf16"), ("m16n8k8", "f32", "f16"), ("m16n8k8", "f16", "f16"),
       ("m16n8k8", "f32", "tf32"), ("m16n8k4", "f32", "tf32")]


@pytest.mark.parametrize("shape, total, kind", MMA)
def test_mma(shape, total, kind):
    """Layouts by the tables of the ISA: small integers, so that every sum is exact."""
    rng = np.random.default_rng(0)
    k = int(shape.split("k")[1])
    a, b, c = rng.integers(-8, 9, (16, k)), rng.integers(-8, 9, (k, 8)), rng.integers(-8, 9, (16, 8))
    if kind == "tf32":
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        a_regs = [a[g + 8 * (r % 2), t + 4 * (r // 2)] for r in range(k // 2)]
        b_regs = [b[t + 4 * r, g] for r in range(k // 4)]
        a_regs, b_regs = (np.stack(x).astype(np.float32).view(np.uint32) for x in (a_regs, b_regs))
        a_regs = a_regs | np.uint32(0x1fff)  # bits that tf32 does not have
    else:
        bits = np.vectorize(lambda x: encode(kind, float(x)), otypes=[np.uint16])
        a_regs = fragment(bits(a), 2, k // 8)
        b_regs = fragment(bits(b.T), 1, k // 8)
    if total == "f16":
        c_regs = fragment(c.astype(np.float16).view(np.uint16), 2, 1)
    else:
        pairs = c.astype(np.float32).view(np.uint32).reshape(2, 32, 2)
        c_regs = pairs.transpose(0, 2, 1).reshape(4, 32)
    regs = np.concatenate([a_regs, b_regs, c_regs]).astype(np.uint32)
    out = np.zeros((len(c_regs), 32), np.uint32)
    names = [f"%r{i}" for i in range(len(regs))]
    na, nb = len(a_regs), len(b_regs)
    d = [f"%r{30 + i}" for i in range(len(c_regs))]
    body = "mad.wide.u32 %p0, %t, 4, %p0; mad.wide.u32 %p1, %t, 4, %p1;"
    body += "".join(f"ld.global.b32 {n}, [%p0+{128 * i}];" for i, n in enumerate(names))
    body += (f"mma.sync.aligned.{shape}.row.col.{total}.{kind}.{kind}.{total} {{{', '.join(d)}}}, "
             f"{{{', '.join(names[:na])}}}, {{{', '.join(names[na:na + nb])}}}, "
             f"{{{', '.join(names[na + nb:])}}};")
    body += "".join(f"st.global.b32 [%p1+{128 * i}], {n};" for i, n in enumerate(d))
    stats = kernel(body, [regs, out])
    assert stats["mma"] == {f"{shape}.{total}.{kind}.{kind}.{total}": 1} and stats["tensor"] == 1
    if total == "f16":
        got = out.view(np.float16).reshape(16, 8)
    else:
        got = out.reshape(2, 2, 32).transpose(0, 2, 1).copy().view(np.float32).reshape(16, 8)
    assert (got == a @ b + c).all()


def test_mma_f64():
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(s) for s in ((8, 4), (4, 8), (8, 8)))
    out = np.zeros((8, 8))
    body = """mad.wide.u32 %q0, %t, 8, %p0; ld.global.f64 %d0, [%q0];
        mad.wide.u32 %q1, %t, 8, %p1; ld.global.f64 %d1, [%q1];
        mad.wide.u32 %q2, %t, 16, %p2; ld.global.v2.f64 {%d2, %d3}, [%q2];
        mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d4, %d5}, {%d0}, {%d1}, {%d2, %d3};
        mad.wide.u32 %q3, %t, 16, %p3; st.global.v2.f64 [%q3], {%d4, %d5};"""
    kernel(body, [a, np.ascontiguousarray(b.T), c, out])
    assert np.allclose(out, a @ b + c, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    """Rows at permuted places; both orders of the suffixes."""
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 65536, (4, 8, 8), dtype=np.uint16)
    place = rng.permutation(32)
    memory = np.zeros((32, 8), np.uint16)
    memory[place] = tiles.reshape(32, 8)
    where = (place * 16).astype(np.uint32)
    for suffix in (f"x{count}.m8n8", f"m8n8.x{count}"):
        out = np.zeros((count, 32), np.uint32)
        regs = ", ".join(f"%r{10 + i}" for i in range(count))
        body = """mad.wide.u32 %q0, %t, 16, %p0; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%q0];
            mov.u32 %r5, sm; mad.lo.u32 %r4, %t, 16, %r5;
            st.shared.v4.b32 [%r4], {%r0, %r1, %r2, %r3}; bar.warp.sync -1;
            mad.wide.u32 %q1, %t, 4, %p1; ld.global.b32 %r6, [%q1]; add.u32 %r6, %r6, %r5;"""
        body += f"ldmatrix.sync.aligned.{suffix}{trans}.shared.b16 {{{regs}}}, [%r6];"
        body += "mad.wide.u32 %q2, %t, 4, %p2;"
        body += "".join(f"st.global.b32 [%q2+{128 * i}], %r{10 + i};" for i in range(count))
        kernel(body, [memory, where, out], declarations=".shared .align 16 .b8 sm[512];")
        expected = tiles.transpose(0, 2, 1) if trans else tiles
        assert (out.view(np.uint16).reshape(count, 8, 8) == expected[:count]).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async(size):
    """Whole copies, copies with zero fill, two groups waited for one after the other."""
    source = np.random.default_rng(0).integers(1, 255, 64 * size, dtype=np.uint8)
    lengths = (np.arange(32) % (size + 1)).astype(np.uint32)
    out = np.zeros((2, 32 * size), np.uint8)
    body = f"""mov.u32 %r0, sm; mad.lo.u32 %r1, %t, {size}, %r0; mad.wide.u32 %q0, %t, {size}, %p0;
        mad.wide.u32 %q1, %t, 4, %p1; ld.global.b32 %r2, [%q1];
        cp.async.c{'g' if size == 16 else 'a'}.shared.global.L2::128B [%r1], [%q0], {size};
        cp.async.commit_group;
        cp.async.ca.shared.global [%r1+{32 * size}], [%q0+{32 * size}], {size}, %r2;
        cp.async.commit_group;
        cp.async.wait_group 1; mad.wide.u32 %q2, %t, {size}, %p2;"""
    for half in (0, 32 * size):
        body += "".join(f"ld.shared.b32 %r{8 + i}, [%r1+{half + 4 * i}];"
                        f"st.global.b32 [%q2+{half + 4 * i}], %r{8 + i};" for i in range(size // 4))
        body += "cp.async.wait_all;"
    kernel(body, [source, lengths, out], declarations=".shared .align 16 .b8 sm[1024];")
    expected = source.reshape(2, 32, size).copy()
    for lane in range(32):
        expected[1, lane, lengths[lane]:] = 0
    assert (out.reshape(2, 32, size) == expected).all()


LOADS = [("u8", "b16", np.uint8), ("s8", "b16", np.int8), ("u8", "b32", np.uint8),
         ("s8", "b32", np.int8), ("s8", "b64", np.int8), ("u16", "b32", np.uint16),
         ("s16", "b32", np.int16), ("s16", "b64", np.int16), ("u32", "b64", np.uint32),
         ("s32", "b64", np.int32), ("u64", "b64", np.uint64)]


@pytest.mark.parametrize("space", ["global", "shared", "generic", "param"])
@pytest.mark.parametrize("kind, register, dtype", LOADS)
def test_loads_extend(space, kind, register, dtype):
    """Narrow loads extend by their type, through every space."""
    value = np.array([0x80, 0x8001, 0x80000001, 0x8000000000000001][
        {1: 0, 2: 1, 4: 2, 8: 3}[np.dtype(dtype).itemsize]], np.uint64).astype(dtype)
    out = np.zeros(32, {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}[register])
    size = np.dtype(dtype).itemsize
    source = np.full(32, value, dtype)
    place = f".reg .{register} v; mad.wide.u32 %q0, %t, {size}, %p0;"
    bits = 8 * size
    move = (f"{{.reg .b{max(bits, 16)} x; ld.global.b{bits} x, [%q0]; mad.lo.u32 %r1, %t, {size}, "
            f"%r0; st.shared.b{bits} [%r1], x;}}")
    body = place + {
        "global": f"ld.global.{kind} v, [%q0];",
        "param": f"ld.param.{kind} v, [a0];",
        "shared": f"mov.u32 %r0, sm; {move} ld.shared.{kind} v, [%r1];",
        "generic": f"mov.u32 %r0, sm; {move} cvt.u64.u32 %q1, %r1; cvta.shared.u64 %q1, %q1; "
                   f"ld.{kind} v, [%q1];"}[space]
    body += f"mad.wide.u32 %q2, %t, {out.itemsize}, %p1; st.global.{register} [%q2], v;"
    first = source if space != "param" else int.from_bytes(source[:8 // size].tobytes(), "little")
    kernel(body, [first, out], declarations=".shared .align 8 .b8 sm[256];")
    assert (out == np.array(value).astype(np.int64).astype(out.dtype)).all()


@pytest.mark.parametrize("kind, size", [("b8", 1), ("b16", 2), ("b32", 4), ("b64", 8), ("f32", 4)])
@pytest.mark.parametrize("vector", [1, 2, 4])
def test_vectors(kind, size, vector):
    if size * vector > 16:
        return
    source = np.random.default_rng(0).integers(0, 256, 32 * size * vector, dtype=np.uint8)
    out = np.zeros_like(source)
    width = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}[size]
    regs = [f"v{i}" for i in range(vector)]
    group = regs[0] if vector == 1 else "{ " + " , ".join(regs) + " }"
    suffix = f".v{vector}" if vector > 1 else ""
    for guard, expected in (("", source), ("@%c0 ", source.copy())):
        out[:] = 0
        body = (f".reg .{width} v<4>; setp.lt.u32 %c0, %t, 7; mad.wide.u32 %q0, %t, "
                f"{size * vector}, %p0; mad.wide.u32 %q1, %t, {size * vector}, %p1; "
                f"{guard}ld.global.nc.L1::no_allocate.L2::128B{suffix}.{kind} {group}, [ %q0 + 0 ];"
                f"{guard}st.global.cs{suffix}.{kind} [%q1], {group};")
        kernel(body, [source, out])
        if guard:
            expected[7 * size * vector:] = 0
        assert (out == expected).all()


ATOMS = {"add.u32": lambda o, b: o + b, "add.s32": lambda o, b: o + b,
         "add.u64": lambda o, b: o + b, "min.u32": min, "max.u32": max, "min.s32": min,
         "max.s32": max, "min.u64": min, "max.s64": max, "and.b32": lambda o, b: o & b,
         "or.b32": lambda o, b: o | b, "xor.b64": lambda o, b: o ^ b, "exch.b32": lambda o, b: b,
         "exch.b64": lambda o, b: b, "inc.u32": lambda o, b: 0 if o >= b else o + 1,
         "dec.u32": lambda o, b: b if o == 0 or o > b else o - 1}


@pytest.mark.parametrize("space", ["global", "shared", "generic"])
@pytest.mark.parametrize("op", [*ATOMS, "cas.b32", "cas.b64", "cas.b16", "add.f32", "add.f64",
                                "add.noftz.f16", "add.noftz.f16x2"])
def test_atomics(op, space):
    """The 32 lanes take turns at one address: the old values are a chain."""
    kind = op.split(".")[-1]
    size = {"6": 2, "2": 4, "4": 8}[kind[-1]] if kind != "f16x2" else 4
    rng = np.random.default_rng(0)
    float_type = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "f16x2": np.float16}
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    if kind in float_type:
        b = rng.standard_normal(32 * (2 if kind == "f16x2" else 1)).astype(float_type[kind])
        first = np.ones(2 if kind == "f16x2" else 1, float_type[kind])
    else:
        typed = np.dtype({"s": "i", "u": "u", "b": "u"}[kind[0]] + str(size))
        b = rng.integers(0, 9, 32).astype(typed) * (typed.type(-1) if kind[0] == "s" else
                                                    typed.type(1))
        first = np.array([3], typed)
    out, cell = np.zeros(32, unsigned), first.copy().view(unsigned)
    cas = op.startswith("cas")
    where = {"global": "%p0", "shared": "sm", "generic": "%q3"}[space]
    bits = 8 * size
    body = f""".reg .b{bits} x, y, z; mad.wide.u32 %q0, %t, {size}, %p1; ld.global.b{bits} y, [%q0];
        setp.eq.u32 %c0, %t, 0; cvta.shared.u64 %q3, sm;
        @%c0 ld.global.b{bits} z, [%p0]; @%c0 st.shared.b{bits} [sm], z; bar.warp.sync -1;
        mov.b{bits} z, 7;
        atom{'' if space == 'generic' else '.' + space}.{op} x, [{where}], y{', z' if cas else ''};
        mad.wide.u32 %q1, %t, {size}, %p2; st.global.b{bits} [%q1], x; bar.warp.sync -1;"""
    if space != "global":
        body += f"@%c0 ld.shared.b{bits} z, [sm]; @%c0 st.global.b{bits} [%p0], z;"
    stats = kernel(body, [cell, b, out], declarations=".shared .align 16 .b8 sm[16];")
    assert stats["atomics"] == 32
    if kind in float_type:
        b, old = b.reshape(32, -1), out.view(float_type[kind]).reshape(32, -1)
        final = cell.view(float_type[kind])

        def step(o, x):
            return (o + x).astype(float_type[kind])
    else:
        old, final = out.view(first.dtype), cell.view(first.dtype)

        def step(o, x):
            o, x = int(o), int(x)
            result = (7 if o == x else o) if cas else ATOMS[op](o, x)
            return np.array(result & (1 << bits) - 1, unsigned).view(first.dtype)
    chain = first
    for lane in range(32):
        assert (old[lane] == chain).all()
        chain = step(old[lane], b[lane])
    assert (final == chain).all()


@pytest.mark.parametrize("op", ["add.u32", "min.s32", "or.b32", "add.f32"])
def test_red_from_many_blocks(op):
    cell = np.zeros(1, np.float32 if op.endswith("f32") else np.uint32)
    value = "mov.b32 %r0, 0f3F800000;" if op.endswith("f32") else "mov.b32 %r0, 1;"
    kernel(value + f"red.global.gpu.relaxed.{op} [%p0], %r0;".replace("gpu.relaxed", "relaxed.gpu"),
           [cell], grid=50, block=96)
    assert cell[0] == {"add.u32": 4800, "min.s32": 0, "or.b32": 1, "add.f32": 4800}[op]


def test_bar_red():
    out = np.zeros((3, 96), np.uint32)
    kernel("""setp.lt.u32 %c0, %t, 40; mad.wide.u32 %q0, %t, 4, %p0;
        bar.red.popc.u32 %r0, 0, %c0; st.global.b32 [%q0], %r0;
        bar.red.and.pred %c1, 0, %c0; selp.b32 %r1, 1, 0, %c1; st.global.b32 [%q0+384], %r1;
        bar.red.or.pred %c2, 0, !%c0; selp.b32 %r2, 1, 0, %c2; st.global.b32 [%q0+768], %r2;""",
           [out], block=96)
    assert (out[0] == 40).all() and (out[1] == 0).all() and (out[2] == 1).all()


def test_named_barriers():
    """Two warps produce, two consume: bar.arrive and bar.sync of one barrier."""
    out = np.zeros(64, np.uint32)
    body = """mov.u32 %r0, sm; setp.lt.u32 %c0, %t, 64; @!%c0 bra CONSUME;
        mad.lo.u32 %r1, %t, 4, %r0; st.shared.u32 [%r1], %t; bar.arrive 1, 128; bra DONE;
        CONSUME: bar.sync 1, 128; sub.u32 %r2, 127, %t; mad.lo.u32 %r1, %r2, 4, %r0;
        ld.shared.u32 %r3, [%r1]; sub.u32 %r4, %t, 64; mad.wide.u32 %q0, %r4, 4, %p0;
        st.global.u32 [%q0], %r3; DONE:"""
    kernel(body, [out], block=128, declarations=".shared .align 4 .b8 sm[256];")
    assert (out == 63 - np.arange(64)).all()


@pytest.mark.parametrize("seed", range(5))
def test_divergence_and_loops(seed):
    """Collatz steps per lane: loops of unequal length, nested branches, a table jump, exits."""
    start = np.random.default_rng(seed).integers(1, 999, 200).astype(np.uint32)
    out = np.zeros(200, np.uint32)
    body = """mad.wide.u32 %q0, %t, 4, %p0; ld.global.u32 %r0, [%q0]; mov.u32 %r1, 0;
        LOOP: setp.eq.u32 %c0, %r0, 1; @%c0 bra DONE; add.u32 %r1, %r1, 1;
        and.b32 %r2, %r0, 1; ts: .branchtargets EVEN, ODD; brx.idx %r2, ts;
        ODD: mad.lo.u32 %r0, %r0, 3, 1; bra LOOP;
        EVEN: shr.u32 %r0, %r0, 1; bra LOOP;
        DONE: setp.gt.u32 %c1, %r1, 100; mad.wide.u32 %q1, %t, 4, %p1; @!%c1 bra STORE;
        mov.u32 %r1, 0xffff; st.global.u32 [%q1], %r1; exit; STORE: st.global.u32 [%q1], %r1;"""
    kernel(body, [start, out], block=200, device=Device(seed=seed))

    def steps(n):
        count = 0
        while n != 1:
            n, count = (3 * n + 1 if n % 2 else n // 2), count + 1
        return count if count <= 100 else 0xffff
    assert out.tolist() == [steps(int(n)) for n in start]


def test_lanes_meet_again_for_a_shuffle():
    """After an if and a loop of unequal length all 32 lanes take part in one shuffle."""
    out = np.zeros(32, np.uint32)
    body = """mov.u32 %r0, %t; setp.gt.u32 %c0, %t, 9; @!%c0 bra MEET;
        LOOP: add.u32 %r0, %r0, 1; setp.lt.u32 %c1, %r0, 40; @%c1 bra LOOP;
        MEET: shfl.sync.bfly.b32 %r1, %r0, 31, 31, -1; mad.wide.u32 %q0, %t, 4, %p0;
        st.global.u32 [%q0], %r1;"""
    kernel(body, [out])
    assert (out == np.where(LANES[::-1] > 9, 40, LANES[::-1])).all()


def test_wave_of_counters():
    """Bank conflicts, sectors and unique bytes of known patterns."""
    data = np.zeros(32 * 32, np.uint32)
    shared = ".shared .align 16 .b8 sm[4096];"

    def wavefronts(stride):
        stats = kernel(f"mov.u32 %r0, sm; mad.lo.u32 %r1, %t, {4 * stride}, %r0; "
                       "st.shared.u32 [%r1], %t;", [data], declarations=shared)
        return stats["shared_wavefronts"], stats["shared_wavefronts_ideal"]
    assert [wavefronts(s) for s in (1, 2, 4, 31, 32)] == [(1, 1), (2, 1), (4, 1), (1, 1), (32, 1)]

    def sectors(stride, size=4):
        vector = {4: "u32 %r0", 16: "v4.u32 {%r0, %r1, %r2, %r3}"}[size]
        stats = kernel(f"mad.wide.u32 %q0, %t, {stride}, %p0; ld.global.{vector}, [%q0];", [data])
        return stats["global_load_sectors"], stats["global_load_sectors_ideal"], \
            stats["global_unique_bytes_read"], stats["global_load_bytes"]
    assert sectors(4) == (4, 4, 128, 128)
    assert sectors(128) == (32, 4, 128, 128)
    assert sectors(16, 16) == (16, 16, 512, 512)
    assert sectors(0) == (1, 1, 4, 128)


def test_half_atomics_keep_subnormals():
    bits = operands(["f16"], n=300)[0]
    for a in bits[:60]:
        cell = np.array([a, 0], np.uint16)
        kernel("mov.b16 %h0, 1; setp.eq.u32 %c0, %t, 0; "
               "@%c0 atom.global.add.noftz.f16 %h1, [%p0], %h0;", [cell])
        expected = encode("f16", decode("f16", a) + 2.0 ** -24)
        assert cell[0] == expected
