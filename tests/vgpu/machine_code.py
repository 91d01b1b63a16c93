"""What ptxas made of the CUDA kernels for sm_80: resources, instructions, loads in flight."""

import functools
import re

import sass

from . import library

# One SM of an A100.
REGISTERS, THREADS, BLOCKS, SHARED_BYTES = 65536, 2048, 32, 164 << 10
BLOCK_SHARED_OVERHEAD = 1024  # bytes that the driver keeps of each block's shared memory


@functools.cache
def resources(source):
    """sass.resources of a CUDA file."""
    return sass.resources(library.kernel_object(source))


@functools.cache
def instructions(source):
    """{kernel: its instructions, as text without predicates} of a CUDA file."""
    kernels = re.split(r"Function : ", sass.dump("-sass", library.kernel_object(source)))[1:]
    return {text.split()[0]: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*?)\s*;",
                                        text)
            for text in kernels}


def loads_in_flight(code):
    """The most 16-byte loads from global memory that a thread waits for at one time, going through
    its instructions once, in order: a load is waited for where its result is first used, and with
    it every load before it."""
    waiting, most = [], 0
    for text in code:
        registers = {int(r) for r in re.findall(r"\bR(\d+)", text)}
        used = [i for i, results in enumerate(waiting) if results & registers]
        if used:
            waiting = waiting[used[-1] + 1:]
        if re.match(r"LDG\S*\.128", text):
            first = int(re.search(r"\bR(\d+)", text)[1])
            waiting.append(set(range(first, first + 4)))
            most = max(most, len(waiting))
    return most


def load_rounds(code, load_bytes):
    """How often a warp waits for loads from global memory, one wait after the other, if it loads
    `load_bytes` with the instructions in `code`. Going through them once, in order, a load that is
    issued after the result of another was first used is of a later round than that one. The rounds
    with loads of the widest kind are repeated as often as the bytes ask for; others count once."""
    waiting, done, widest = [], 0, {}  # widest: {round: (bytes of a lane, how many such loads)}
    for text in code:
        registers = {int(r) for r in re.findall(r"\bR(\d+)", text)}
        used = [i for i, (results, _) in enumerate(waiting) if results & registers]
        if used:
            done = max(done, *(turn for _, turn in waiting[:used[-1] + 1]))
            waiting = waiting[used[-1] + 1:]
        if load := re.match(r"LDG\S*", text):
            first = int(re.search(r"\bR(\d+)", text)[1])
            words = 4 if ".128" in load[0] else 2 if ".64" in load[0] else 1
            waiting.append((set(range(first, first + words)), done + 1))
            size, loads = widest.get(done + 1, (0, 0))
            widest[done + 1] = max((size, loads),
                                   (4 * words, loads + 1 if size == 4 * words else 1))
    most = max((size for size, _ in widest.values()), default=0)
    wide = [loads for size, loads in widest.values() if size == most]
    times = load_bytes / (32 * most * sum(wide)) if wide else 0
    return len(widest) - len(wide) + len(wide) * max(1, times)


def resident_threads(registers, block_threads, shared_bytes):
    """Threads that an SM holds of blocks of so many threads with so many registers each and so much
    shared memory: registers are given out by 256 a warp."""
    warps = -(-block_threads // 32)
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_BYTES // (shared_bytes + BLOCK_SHARED_OVERHEAD)
    return min(by_registers, by_shared, THREADS // (warps * 32), BLOCKS) * block_threads
