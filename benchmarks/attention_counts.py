"""What attention's kernels for tensor cores ask of an A100: machine code of their hot loops for
sm_80, and traffic on the virtual A100, bf16 and causal.

registers                of a thread
instructions per HMMA    of the hot loop, and of these MUFU per HMMA
shared time              of the loop's LDSM and STS over the time of its HMMA
tensor work              HMMA m16n8k16 over those of the scores that are seen
wavefronts, sectors      over those without bank conflicts; over the fewest that carry the bytes
bytes                    of global memory touched, each counted once, over what must move
instructions             of PTX per mma, of the whole kernel
"""

import dataclasses
import functools

import torch

import llama_ext  # noqa: F401  registers the ops

from .counts import vgpu

T, H, HKV = 2048, 4, 2


@dataclasses.dataclass(frozen=True)
class Part:
    """A kernel: of keys or of queries it owns `rows` a block, and takes the others in tiles of
    `columns`. moves: tensors like q, like k, and numbers a query, that it must move."""

    name: str
    source: str
    kernel: str
    products: int
    rows: int
    columns: int
    of_keys: bool
    moves: tuple


PARTS = {D: (
    Part("forward", "attention_fwd.cu", "attention_fwd_kernel", 2, 128, {64: 64, 128: 32}[D], False,
         (2, 2, 1)),
    Part("backward dk, dv", "attention_bwd_dkdv.cu", "attention_bwd_dkdv_kernel", 4,
         {64: 256, 128: 128}[D], {64: 128, 128: 64}[D], True, (2, 4, 2)),
    Part("backward dq", "attention_bwd_dq.cu", "attention_bwd_dq_kernel", 3,
         {64: 256, 128: 128}[D], {64: 128, 128: 64}[D], False, (3, 2, 2)),
) for D in (64, 128)}


def seen_mmas(D):
    """mma's m16n8k16 of one product, of the scores that are seen."""
    return H * T * (T + 1) / 2 * D / (16 * 8 * 16)


@functools.cache
def launches(D):
    """{kernel's name without types: the virtual A100's counts} of a forward and backward pass."""
    library, _ = vgpu()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, h, D).bfloat16() for h in (H, HKV, HKV))
    op = torch.ops.llama_ext
    library.take_log()
    o, lse = op.attention_fwd(q, k, v, D ** -0.5, True, 0, None, None)
    op.attention_bwd(torch.zeros_like(q), None, q, k, v, o, lse, D ** -0.5, True, 0, None, None)
    names = [part.kernel for part in PARTS[D]] + ["attention_bwd_delta_kernel"]
    return {next(name for name in names if name in launch["kernel"]): launch
            for launch in library.take_log()}


@functools.cache
def traffic(part, D):
    """A dict of the figures that the virtual A100 counts."""
    launch = launches(D)[part.kernel]
    queries, keys, numbers = part.moves
    ideal = 2 * D * T * (queries * H + keys * HKV) + 4 * numbers * H * T
    return {
        "tensor work": launch["tensor"] / (part.products * seen_mmas(D)),
        "wavefronts": launch["shared_wavefronts"] / launch["shared_wavefronts_ideal"],
        "sectors": ((launch["global_load_sectors"] + launch["global_store_sectors"])
                    / (launch["global_load_sectors_ideal"] + launch["global_store_sectors_ideal"])),
        "bytes": (launch["global_unique_bytes_read"]
                  + launch["global_unique_bytes_written"]) / ideal,
        "instructions": launch["warp_instructions"] / launch["tensor"]}


@functools.cache
def machine_code(part, D):
    """A dict of the figures of the machine code, and blocks: those that an SM holds (by registers;
    their shared memory is made to fit)."""
    library, machine_code = vgpu()
    import sass

    launch, source = launches(D)[part.kernel], library.CSRC / "cuda" / part.source
    registers = machine_code.resources(source)[launch["kernel"]]["registers"]
    loop = sass.hot_loop(sass.kernels(library.kernel_object(source))[launch["kernel"]])
    threads = launch["block"][0]
    return {
        "registers": registers,
        "blocks": machine_code.resident_threads(registers, threads, 0) // threads,
        "instructions per HMMA": loop["per HMMA"],
        "MUFU per HMMA": loop["MUFU"] / loop["HMMA"],
        "shared time": loop["shared time"]}
