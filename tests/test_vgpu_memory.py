"""Memory on the virtual A100: loads and stores of every width and space, cp.async, atomics, and
the counters of sectors and bank conflicts."""

import numpy as np
import pytest

import vgpu
from ptx_forms import HEADER, decode, encode, kernel, operands


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


def test_marks_of_earlier_launches_mean_nothing():
    """Launches are told apart by ten bits, and the marks' pages are used again: when the number of
    a launch comes back, another block writes an element than in the one before of that number."""
    text = (HEADER + ".visible .entry k(.param .u64 a, .param .u32 turn) { .reg .b64 %p; .reg .b32 "
            "%r<4>; ld.param.u64 %p, [a]; ld.param.u32 %r0, [turn]; mov.u32 %r1, %ctaid.x; "
            "xor.b32 %r1, %r1, %r0; mov.u32 %r2, %tid.x; mad.lo.u32 %r2, %r1, 32, %r2; "
            "mad.wide.u32 %p, %r2, 4, %p; st.global.u32 [%p], %r2; ret; }")
    device = vgpu.Device()
    module = device.load_ptx(text)
    kept, large = np.zeros(64, np.uint32), np.zeros(1 << 16, np.uint32)
    device.register(kept)
    for i in range(1023 + 2):
        out = {0: kept, 1: np.zeros(64, np.uint32)}.get(i % 1023, large)
        module.launch("k", 2, 32, [out, i // 1023])
        assert (out[:64] == np.arange(64)).all()


def test_memory_after_other_memory_is_uninitialised():
    device = vgpu.Device()
    copy = ("mad.wide.u32 %q0, %t, 4, %p0; ld.global.u32 %r0, [%q0]; "
            "mad.wide.u32 %q1, %t, 4, %p1; st.global.u32 [%q1], %r0;")
    for _ in range(3):
        a, b = np.zeros(2048, np.uint32), device.empty(2048, np.uint32)
        kernel(copy, [a, b], block=1024, device=device)
        kernel(copy, [b, a], block=1024, device=device)
        device.unregister(b)
        b = device.empty(2048, np.uint32)
        with pytest.raises(vgpu.Fault, match="uninitialised"):
            kernel(copy, [b, a], device=device)
        device.unregister(b)
