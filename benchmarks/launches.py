"""What each launch of the ops that memory limits asks of a GPU, for the model of their times
(a100/bandwidth.py): counted on the virtual A100, bf16, widths of LLaMA 7B, at two sizes; between
and beyond them every figure is linear in the size.

grid, warps      blocks, and warps of each
resident         blocks that an SM holds at a time, by registers, threads and shared memory
teams            of a block: groups of warps that wait for each other at barriers, or single warps
                 where they do so at most at their end
bytes            of global memory that the launch touches, each counted once
asked            bytes that its threads ask for
instructions     of warps, in PTX
rounds           of loads from global memory, each of which a warp waits for before the next
must             bytes that the op, all its launches together, must move
"""

import dataclasses
from typing import Callable

import torch

import llama_ext  # noqa: F401  registers the ops

from . import counts


@dataclasses.dataclass(frozen=True)
class Scaled:
    """An op, and its case for a number of rows (of linear_int8: of outputs). alone: warps that
    share a row wait for each other only at its end."""

    name: str
    size: int
    case: Callable
    alone: bool = False

    @property
    def sizes(self):
        """Those that it is counted at."""
        return self.size // 2, self.size


CASES = [
    Scaled("rmsnorm forward", 2048, lambda n: counts.rmsnorm(False, False, n)),
    Scaled("rmsnorm backward", 2048, lambda n: counts.rmsnorm(False, True, n)),
    Scaled("rmsnorm_residual forward", 2048, lambda n: counts.rmsnorm(True, False, n)),
    Scaled("rmsnorm_residual backward", 2048, lambda n: counts.rmsnorm(True, True, n)),
    Scaled("swiglu forward", 256, lambda n: counts.swiglu(False, False, n)),
    Scaled("swiglu backward", 256, lambda n: counts.swiglu(False, True, n)),
    Scaled("rope forward", 2048, lambda n: counts.rope(True, 1, False, n)),
    Scaled("rope backward", 2048, lambda n: counts.rope(True, 1, True, n)),
    Scaled("cross_entropy forward", 128, lambda n: counts.cross_entropy(False, 32000, n),
           alone=True),
    Scaled("cross_entropy backward", 128, lambda n: counts.cross_entropy(True, 32000, n)),
    Scaled("linear_int8 of 1 row", 2048, lambda n: counts.linear_int8(1, n), alone=True),
    Scaled("linear_int8 of 8 rows", 2048, lambda n: counts.linear_int8(8, n), alone=True),
]


def figures(launch, alone):
    """Of a launch in the virtual A100's log."""
    _, machine_code = counts.vgpu()
    found, code = counts.machine_code_of(launch)
    x, y, z = launch["block"]
    grid, warps = torch.Size(launch["grid"]).numel(), -(-x * y * z // 32)
    resident = machine_code.resident_threads(found["registers"], x * y * z, found["shared"])
    return {
        "grid": grid, "warps": warps, "resident": resident // (x * y * z),
        "teams": y if launch["barriers"] and not alone else warps,
        "bytes": launch["global_unique_bytes_read"] + launch["global_unique_bytes_written"],
        "asked": launch["global_load_bytes"] + launch["global_store_bytes"],
        "instructions": launch["warp_instructions"],
        "rounds": machine_code.load_rounds(code, launch["global_load_bytes"] / (grid * warps))}


def measure(scaled, size):
    """{"op, size, number of the launch": its figures}"""
    library, _ = counts.vgpu()
    torch.manual_seed(0)
    call, must = scaled.case(size).prepare()
    library.take_log()
    call()
    return {f"{scaled.name}, {size}, {number}": figures(launch, scaled.alone) | {"must": must}
            for number, launch in enumerate(library.take_log(), 1)}
