"""Planted faults, compiled by nvcc: each is reported with kernel, block, thread and PTX line; its
correct twin (the same source with PLANT=0) runs without complaint and gives the right result."""

from pathlib import Path

import numpy as np
import pytest

import vgpu
from vgpu.library import compile_ptx

SOURCE = Path(__file__).with_name("vgpu_faults.cu")
X = np.arange(1, 1025, dtype=np.float32)
I32 = np.zeros(1024, np.int32)


def f32(n=1024):
    return np.zeros(n, np.float32)


def i32(n=1024):
    return np.zeros(n, np.int32)


@pytest.fixture(scope="module")
def modules():
    return [compile_ptx(SOURCE, "-lineinfo", f"-DPLANT={plant}") for plant in (0, 1)]


def shifted(x):
    return np.roll(x[:512], -128) + 1


# name: (grid, block, arguments, dynamic shared bytes, what the fault says, what y must be)
CATALOGUE = {
    "out_of_bounds": (8, 128, lambda g: [f32(1000), X[:1000].copy(), 1000], 0,
                      "reads 4 bytes out of bounds, 0 bytes past the end", lambda: 2 * X[:1000]),
    "before_the_beginning": (1, 128, lambda g: [f32(128), X.copy(), 128], 0,
                             "reads 4 bytes out of bounds, 4 bytes before the beginning",
                             lambda: X[:128]),
    "missing_syncthreads": (1, 128, lambda g: [f32(128), X.copy()], 0,
                            "race: .* shared memory|uninitialised shared", lambda: X[127::-1]),
    "missing_second_syncthreads": (1, 128, lambda g: [f32(128), X.copy(), 4], 0,
                                   "race: .* shared memory .* with no barrier",
                                   lambda: X[:512].reshape(4, 128)[:, ::-1].sum(0)),
    "shared_write_write": (1, 64, lambda g: [i32(64)], 0,
                           "race: writes shared memory .* writes with no barrier",
                           lambda: np.arange(64) % 32),
    "lanes_write_write": (1, 32, lambda g: [i32(32)], 0,
                          "race: lanes of this warp write different values to one address",
                          lambda: np.arange(32) // 2),
    "global_write_write_warps": (1, 64, lambda g: [i32(64)], 0,
                                 "race: writes global memory that warp . writes with no barrier",
                                 lambda: np.arange(64)),
    "global_read_write_warps": (1, 128, lambda g: [i32(128), i32(128)], 0,
                                "race: .* global memory that warp .* with no barrier",
                                lambda: np.arange(128)[::-1]),
    "global_write_write_blocks": (4, 32, lambda g: [i32(128)], 0,
                                  r"race: writes global memory that warp 0 of block \(",
                                  lambda: np.arange(128) // 32),
    "global_read_write_blocks": (4, 128, lambda g: [a := i32(512), a], 0,
                                 r"race: .* global memory that warp . of block \(",
                                 lambda: np.ones(512)),
    "plain_instead_of_atomic": (2, 128, lambda g: [i32(1)], 0, "race: .* global memory",
                                lambda: np.array([8])),
    "last_block_without_fence": (9, 64, lambda g: [f32(1), f32(9), np.zeros(1, np.uint32),
                                                   X.copy()], 0,
                                 "race: reads global memory .* writes with no order",
                                 lambda: X[:9].sum(keepdims=True)),
    "uninitialised_shared": (1, 128, lambda g: [f32(128), X.copy()], 0,
                             r"reads uninitialised shared memory \(byte 508\)",
                             lambda: X[:128].reshape(-1, 2)[:, ::-1].ravel()),
    "uninitialised_global": (1, 128, lambda g: [f32(128), g.empty(128), X.copy()], 0,
                             "reads uninitialised global memory", lambda: X[:128]),
    "misaligned_vector": (1, 32, lambda g: [f32(128), X.copy()], 0,
                          "a misaligned access: 16 bytes", lambda: X[:128]),
    "divergent_barrier": (1, 64, lambda g: [i32(64)], 0,
                          "a barrier that thread 48 of the block cannot reach: it has exited",
                          lambda: np.arange(64)),
    "barrier_in_both_branches": (1, 64, lambda g: [i32(64)], 0,
                                 "divergence: waits for lane .* never comes here",
                                 lambda: np.arange(64) % 2),
    "barrier_of_one_warp": (1, 96, lambda g: [i32(96)], 0,
                            "a barrier that is never complete: 32 of 96 threads",
                            lambda: np.arange(96)),
    "barrier_after_exit": (1, 64, lambda g: [i32(64), 40], 0,
                           "a barrier that thread 40 of the block cannot reach: it has exited",
                           lambda: np.arange(64) * (np.arange(64) < 40)),
    "shuffle_outside_mask": (1, 32, lambda g: [i32(32)], 0,
                             "lane 16 is not in the mask 0x0000ffff", lambda: np.arange(32) ^ 1),
    "shuffle_names_absent_lanes": (1, 32, lambda g: [i32(32)], 0,
                                   "names lanes that have exited|never comes here",
                                   lambda: np.where(np.arange(32) < 16, np.arange(32) ^ 1,
                                                    np.arange(32))),
    "shuffle_reads_absent_lane": (1, 32, lambda g: [i32(32)], 0,
                                  "reads the register of lane 16, which does not take part",
                                  lambda: np.where(np.arange(32) < 16, np.arange(32) ^ 1,
                                                   np.arange(32))),
    "cp_async_without_wait": (1, 64, lambda g: [f32(256), X.copy()], 0,
                              "cp.async is still copying", lambda: X[:256]),
    "cp_async_waits_one_group_short": (1, 64, lambda g: [f32(256), X.copy()], 0,
                                       "cp.async is still copying", None),
    "cp_async_without_barrier": (1, 64, lambda g: [f32(256), X.copy()], 0,
                                 "race: .* shared memory|still copying|uninitialised shared",
                                 lambda: X[:256].reshape(64, 4)[::-1].ravel()),
    "cp_async_into_a_stage_in_use": (1, 64, lambda g: [f32(256), X.copy(), 4], 0,
                                     "race: .* shared memory|still copying", None),
    "beyond_dynamic_shared": (1, 128, lambda g: [f32(100), X.copy(), 100], 400,
                              r"writes 4 bytes at byte 400 of shared memory, .* 400 bytes "
                              r"\(0 static, 400 dynamic\)", lambda: X[99::-1]),
    "row_offset_overflow": (1, 64, lambda g: [np.zeros((1 << 15) * 65537, np.uint16), 1 << 15,
                                              65536], 0,
                            "out of bounds, .* bytes before the beginning of an allocation",
                            None),
    "missing_syncwarp": (1, 32, lambda g: [i32(32)], 0, "race: .* shared memory",
                         lambda: np.arange(32)[::-1]),
    "last_reader_writes": (1, 32, lambda g: [i32(32)], 0,
                           "thread .31, 0, 0.*race: writes shared memory .* other lanes read with",
                           lambda: np.full(32, 5)),
    "never_ends": (1, 32, lambda g: [i32(1), i32(32)], 0, "the block does not end", None),
    "wrong_order_of_named_barriers": (1, 64, lambda g: [i32(64)], 0,
                                      "a barrier that is never complete", lambda: np.arange(64)),
}


def launch(ptx, name, seed):
    grid, block, make, shared, reason, result = CATALOGUE[name]
    gpu = vgpu.Device(seed=seed, limit=300_000)
    args = make(gpu)
    try:
        gpu.load_ptx(ptx).launch(name, grid, block, args, shared)
    finally:
        if name == "uninitialised_global":
            gpu.unregister(args[1])
    return args


@pytest.fixture(scope="module")
def table(summary):
    """Collects what was reported; printed at the end of the run."""
    rows = {}
    yield rows
    summary += ["", "| planted fault | block | thread | PTX line | reported |", "|-|-|-|-|-|"]
    for name, f in rows.items():
        opcode = next(word for word in f.ptx.split() if not word.startswith("@"))
        summary.append(f"| {name} | {f.block} | {f.thread} | {f.line} `{opcode}` | {f.reason} |")


@pytest.mark.parametrize("name", CATALOGUE)
def test_fault_and_twin(modules, name, table):
    reason, result = CATALOGUE[name][4:]
    for seed in range(4):
        args = launch(modules[0], name, seed)
        if result:
            assert (args[0] == result()).all()
        with pytest.raises(vgpu.Fault, match=reason) as raised:
            launch(modules[1], name, seed)
        fault = raised.value
        line = modules[1].splitlines()[fault.line - 1].strip()
        assert fault.kernel == name and fault.ptx == line and fault.reason in str(fault)
        assert f"kernel {name}, block " in str(fault) and f"PTX line {fault.line}" in str(fault)
        assert len(fault.block) == len(fault.thread) == 3
        assert fault.source.startswith(("vgpu_faults.cu:", "cuda_pipeline", "sm_"))
        table.setdefault(name, fault)


def test_faults_repeat_with_one_thread(modules):
    """The same seed and one CPU thread: the very same report."""
    for name in ("global_write_write_blocks", "missing_syncthreads", "plain_instead_of_atomic"):
        texts = set()
        for _ in range(3):
            gpu = vgpu.Device(seed=7, threads=1)
            grid, block, make, shared, *_ = CATALOGUE[name]
            with pytest.raises(vgpu.Fault) as raised:
                gpu.load_ptx(modules[1]).launch(name, grid, block, make(gpu), shared)
            texts.add(str(raised.value))
        assert len(texts) == 1
