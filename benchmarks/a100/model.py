"""Time of attention kernels on tensor cores, from their machine code and the GPU's limits.

A kernel's work is its hot loop. What a sub-core (a quarter of an SM) needs for one HMMA m16n8k16
and what comes with it, were each pipe alone, is
    tensor   the clocks for which the HMMA keeps the tensor core busy
    issue    one clock for each instruction of the loop per HMMA
    MUFU     eight clocks for each of its MUFU instructions (4 lanes a clock)
    shared   a quarter SM's share of 128 bytes a clock, for the bytes of its LDSM and STS
Pipes overlap, though not wholly: together they take the 2-norm of the four. Each thread block has
OVERHEAD clocks in addition (first loads, last stores, barriers, masked tiles beyond their share),
and the clock stays at CLOCK of its highest. These three numbers, and no other, were fitted, to
FlashAttention-2's twelve published times on an A100 (published.py).

Blocks go to the SMs' free places in the order of the grid, each for as long as its own tiles take;
passes that only move memory go at COPY of the GPU's bandwidth, each launch costs LAUNCH seconds.

T tokens, D head dim.
"""

import dataclasses
import heapq

OVERLAP = 2.0    # exponent of the norm
OVERHEAD = 4000  # clocks
CLOCK = 0.88     # of the highest clock
COPY = 0.85      # of the memory's bandwidth
LAUNCH = 4e-6    # seconds


@dataclasses.dataclass(frozen=True)
class Gpu:
    name: str
    sms: int
    clock: float         # Hz, the highest
    hmma_clocks: float   # that one HMMA m16n8k16 keeps a sub-core's tensor core busy
    bandwidth: float     # bytes per second
    reached: float       # share of it that the kernels of bandwidth.py reach
    l2: float            # bytes: half of the cache, for each half keeps copies of the other's lines


# The tensor cores of an H100 reach their full rate, 4 clocks, through wgmma alone. mma.sync is
# taken to need 5; with 4 the model is 6 to 12 % above FlashAttention-2's published times, with 6
# within 5 %.
GPUS = {gpu.name: gpu for gpu in (
    Gpu("A100-80GB", 108, 1.41e9, 8, 2.039e12, COPY, 20e6),
    Gpu("A100-40GB", 108, 1.41e9, 8, 1.555e12, COPY, 20e6),
    Gpu("H100", 132, 1.755e9, 5, 3.35e12, 0.915, 25e6),
    Gpu("H200", 132, 1.755e9, 5, 4.8e12, 0.915, 25e6),
)}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A block owns `rows` queries (of_keys: keys) of one head, and takes the keys (queries) in
    tiles of `columns`; products: matrix products for each pair of tiles."""

    rows: int
    columns: int
    products: int
    instructions: float  # per HMMA
    mufu: float          # per HMMA
    shared: float        # LDSM and STS time over HMMA time, as on an A100
    blocks: int          # that an SM holds
    of_keys: bool = False
    heavy_first: bool = True


def clocks_per_hmma(gpu, kernel):
    pipes = gpu.hmma_clocks, kernel.instructions, 8 * kernel.mufu, 8 * kernel.shared
    return sum(clocks ** OVERLAP for clocks in pipes) ** (1 / OVERLAP)


def causal_tiles(kernel, T):
    """Tiles that each block of a head takes, in the order of the grid."""
    starts = range(0, T, kernel.rows)
    if kernel.of_keys:
        tiles = [-(-(T - start) // kernel.columns) for start in starts]
    else:
        tiles = [-(-min(start + kernel.rows, T) // kernel.columns) for start in starts]
    return sorted(tiles, reverse=True) if kernel.heavy_first else tiles


def kernel_seconds(gpu, kernel, T, D, heads):
    """Of causal attention over `heads` heads (of all sequences) of T tokens each."""
    hmma = kernel.products * kernel.rows * kernel.columns * D / (16 * 8 * 16)  # of a tile
    tile = hmma / 4 * clocks_per_hmma(gpu, kernel) * kernel.blocks  # clocks; blocks share the SM
    tiles = causal_tiles(kernel, T)
    order = ([n for n in tiles for _ in range(heads)] if kernel.heavy_first else tiles * heads)
    free_at = [0.0] * (gpu.sms * kernel.blocks)
    for n in order:
        heapq.heapreplace(free_at, free_at[0] + n * tile + OVERHEAD)
    return max(free_at) / (gpu.clock * CLOCK) + LAUNCH


def copy_seconds(gpu, size):
    """Of a kernel that moves `size` bytes and does little else."""
    return size / (gpu.bandwidth * COPY) + LAUNCH


def causal_flops(T, D, heads):
    """Of the forward, two products, halved for the mask; the backward counts 2.5 times."""
    return 4 * T * T * D * heads / 2
