"""What the CUDA kernels ask of an A100, counted without one: memory traffic on the virtual A100
(tests/vgpu), registers and loads in flight from the machine code for sm_80.

Shapes are those of LLaMA 7B with fewer rows, in bf16. For each launch:

bytes      bytes of global memory that it touches, each counted once, over what the op must move
asked      bytes that its threads ask for, over the same: more where L1 is read again
sectors    32-byte sectors its requests touch, over the fewest that could carry the same bytes
shared     passes over shared memory, over those without bank conflicts (- : it uses none)
per KiB    warp instructions (of PTX) per KiB that the op must move: an A100 that moves 2,039 GB/s
           has room for about 300
registers  of a thread; spilled ones would show as local memory and are an error in the tests
in flight  KiB of loads an SM waits for at once: threads that it holds by registers, shared memory
           and block size, times the 16-byte loads that a thread's code issues before it needs the
           first; latency times bandwidth of an A100 is about 32
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Callable

import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
C, F, H, D, V = 4096, 11008, 32, 128, 32000  # LLaMA 7B
NO_OPTIONS = -100, 0.0, 0.0  # ignore_index, label_smoothing, z_loss


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    direction: str
    shape: str
    prepare: Callable  # () -> (what to call, bytes that it must move)


def _kernel(name):
    return getattr(torch.ops.llama_ext, name).default


def _rand(*shape):
    return torch.randn(shape).bfloat16()


def _moves(call, *tensors):
    """call, and the bytes of the tensors it reads or writes, each once."""
    return call, sum(t.numel() * t.element_size() for t in tensors)


def rmsnorm(residual, backward, rows=4096):
    def prepare():
        x, other, dh, w = *(_rand(rows, C) for _ in range(3)), _rand(C)
        rstd = torch.rand(rows) + 0.5
        if backward and residual:
            return _moves(lambda: _kernel("rmsnorm_residual_bwd")(x, dh, other, w, rstd, True),
                          x, dh, other, x, rstd, w, w)
        if backward:
            return _moves(lambda: _kernel("rmsnorm_bwd")(x, other, w, rstd, True),
                          x, other, x, rstd, w, w)
        if residual:
            return _moves(lambda: _kernel("rmsnorm_residual_fwd")(x, other, w, 1e-6),
                          x, other, x, x, rstd, w)
        return _moves(lambda: _kernel("rmsnorm_fwd")(x, w, 1e-6), x, x, rstd, w)
    return Case("rmsnorm_residual" if residual else "rmsnorm",
                "backward" if backward else "forward", f"{rows} x {C}", prepare)


def swiglu(halves, backward, rows=512):
    def prepare():
        gate_up = _rand(rows, 2 * F)
        gate, up = gate_up.chunk(2, -1) if halves else (_rand(rows, F), _rand(rows, F))
        out = _rand(rows, F)
        if not backward:
            return _moves(lambda: _kernel("swiglu_fwd")(gate, up), gate, up, out)
        if halves:
            return _moves(lambda: _kernel("swiglu_halves_bwd")(out, gate_up), *[gate_up] * 2, out)
        return _moves(lambda: _kernel("swiglu_bwd")(out, gate, up), *[gate, up] * 2, out)
    return Case("swiglu", "backward" if backward else "forward",
                f"{rows} x {F}{' in halves' if halves else ''}", prepare)


def rope(interleaved, batch, inverse=False, tokens=2048):
    """q and k of a fused projection; batch > 1: with a table for each sequence."""
    T = tokens // batch

    def prepare():
        q, k, _ = _rand(batch, T, 3 * H, D).chunk(3, 2)
        cos, sin = (torch.rand(batch, T, D // 2) if batch > 1 else torch.rand(T, D // 2)
                    for _ in range(2))
        return _moves(lambda: _kernel("rope_qk")(q, k, cos, sin, interleaved, inverse),
                      q, k, q, k, cos, sin)
    return Case("rope", "backward" if inverse else "forward",
                f"{batch} x {T} x ({H} + {H}) x {D}{'' if interleaved else ' halves'}", prepare)


def cross_entropy(backward, V, rows):
    def prepare():
        logits, target = _rand(rows, V), torch.randint(V, (rows,))
        loss, lse, one = torch.rand(rows), torch.rand(rows) + 10, torch.tensor(0.1)
        if backward:
            return _moves(lambda: _kernel("cross_entropy_bwd_")(one, logits, target, lse,
                                                                *NO_OPTIONS),
                          logits, logits, target, lse, one)
        return _moves(lambda: _kernel("cross_entropy_fwd")(logits, target, *NO_OPTIONS),
                      logits, target, loss, lse)
    return Case("cross_entropy", "backward" if backward else "forward", f"{rows} x {V}", prepare)


def linear_int8(rows, N=2048):
    def prepare():
        w, scale = torch.randint(-127, 128, (N, C), dtype=torch.int8), torch.rand(N)
        x = _rand(rows, C)
        return _moves(lambda: _kernel("linear_int8")(x, w, scale), x, w, scale, _rand(rows, N))
    return Case("linear_int8", "forward", f"{rows} x {C} -> {N}", prepare)


CASES = [
    *(rmsnorm(residual, backward) for residual in (False, True) for backward in (False, True)),
    *(swiglu(halves, backward) for halves in (False, True) for backward in (False, True)),
    rope(True, 1), rope(False, 1), rope(True, 4), rope(True, 1, inverse=True),
    *(cross_entropy(backward, V, rows) for V, rows in ((32000, 256), (262144, 32), (32001, 256))
      for backward in (False, True)),
    linear_int8(1), linear_int8(8),
]


@dataclasses.dataclass
class Counts:
    bytes: float
    asked: float
    sectors: float
    shared: float | None
    per_kib: float
    launch: dict  # of the kernel that moves the most


def vgpu():
    """The virtual A100's library and machine_code; CPU tensors go to it from now on."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from vgpu import library, machine_code

    library.activate()
    return library, machine_code


def machine_code_of(launch):
    """(resources, instructions) of a launch's kernel."""
    library, machine_code = vgpu()
    for source in library.nvcc.SOURCES:
        known = machine_code.resources(library.CSRC / "cuda" / source.name)
        if launch["kernel"] in known:
            break
    code = machine_code.instructions(library.CSRC / "cuda" / source.name)
    return known[launch["kernel"]], code[launch["kernel"]]


def registers_and_loads_in_flight(launch):
    """Of a launch's kernel; loads in KiB."""
    _, machine_code = vgpu()
    (found, code), (x, y, z) = machine_code_of(launch), launch["block"]
    threads = machine_code.resident_threads(found["registers"], x * y * z, found["shared"])
    return found["registers"], threads * machine_code.loads_in_flight(code) * 16 / 1024


@functools.cache
def count(case):
    """Runs a case on the virtual A100."""
    library, _ = vgpu()
    torch.manual_seed(0)
    call, ideal = case.prepare()
    library.take_log()
    call()
    log = library.take_log()

    def total(*keys):
        return sum(launch[key] for launch in log for key in keys)
    main = max(log, key=lambda launch: launch["global_load_bytes"])
    passes = total("shared_wavefronts_ideal")
    return Counts(
        total("global_unique_bytes_read", "global_unique_bytes_written") / ideal,
        total("global_load_bytes", "global_store_bytes") / ideal,
        total("global_load_sectors", "global_store_sectors")
        / total("global_load_sectors_ideal", "global_store_sectors_ideal"),
        total("shared_wavefronts") / passes if passes else None,
        total("warp_instructions") / (ideal / 1024), main)


def figures(case):
    """A dict of the table's figures."""
    counts = count(case)
    registers, in_flight = registers_and_loads_in_flight(counts.launch)
    return {"bytes": counts.bytes, "asked": counts.asked, "sectors": counts.sectors,
            "shared": counts.shared, "per KiB": counts.per_kib, "registers": registers,
            "in flight": in_flight}


HEADER = (f"{'op':16} {'direction':9} {'shape':34} {'bytes':>6} {'asked':>6} {'sectors':>7} "
          f"{'shared':>6} {'per KiB':>7} {'registers':>9} {'in flight':>9}")


def line(case):
    """A line of the table under HEADER."""
    found = figures(case)
    shared = "-" if found["shared"] is None else f"{found['shared']:.3f}"
    return (f"{case.op:16} {case.direction:9} {case.shape:34} {found['bytes']:6.3f} "
            f"{found['asked']:6.3f} {found['sectors']:7.3f} {shared:>6} {found['per KiB']:7.0f} "
            f"{found['registers']:9} {found['in flight']:9.0f}")


def run(args):
    print(__doc__, HEADER, sep="\n")
    for case in CASES:
        if case.op in (args.ops or [case.op]):
            print(line(case), flush=True)
