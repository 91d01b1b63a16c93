"""What the lanes of a warp do together on the virtual A100: shuffles, votes, reductions, mma,
ldmatrix, barriers, control flow."""

import numpy as np
import pytest

from ptx_forms import encode, kernel, run
from vgpu import Device

LANES = np.arange(32, dtype=np.uint32)


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


def test_groups_with_masks_of_their_own():
    """Four groups of eight lanes in one instruction, each with its mask."""
    value = np.tile(LANES * 3, 4).astype(np.uint32)
    mask = "and.b32 %x, %laneid, 24; shl.b32 %x, 255, %x;"
    got = run(mask + "shfl.sync.bfly.b32 d, a, 1, 0x181f, %x;", ["b32"], "b32", [value])
    assert (got[:32] == (LANES ^ 1) * 3).all()
    got = run(mask + "redux.sync.add.u32 d, a, %x;", ["b32"], "b32", [value])
    assert (got[:32] == value[:32].reshape(4, 8).sum(1).repeat(8)).all()
    got = run(mask + "activemask.b32 d; bar.warp.sync %x; activemask.b32 d;", ["b32"], "b32",
              [value])
    assert (got == 0xffffffff).all()


def test_votes():
    for pattern in (0, 0xffffffff, 0x80000001, 0x0000ffff):
        p = np.tile(pattern >> LANES & 1, 4).astype(np.uint32)
        for vote, expected in (("all", pattern == 0xffffffff), ("any", pattern != 0),
                               ("uni", pattern in (0, 0xffffffff))):
            got = run(f"vote.sync.{vote}.pred d, a, -1;", ["pred"], "pred", [p])
            assert (got == expected).all()
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
    a, b, c = (rng.integers(-8, 9, size) for size in ((16, k), (k, 8), (16, 8)))
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
