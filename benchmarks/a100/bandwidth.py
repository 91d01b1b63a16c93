"""Time of kernels that memory limits, from what a launch asks of the GPU.

A GPU is taken for a closed network of queues, and its customers are the teams that are resident:
warps, or where warps wait for each other at barriers, groups of them. A team goes around
    memory   that all SMs share: its bytes, at the share of the bandwidth that a copy reaches
    its SM   the 2-norm of the clocks to issue its instructions (4 a clock) and those to carry
             the bytes that it asks for from L2 (LINK a clock)
    waiting  LATENCY for each round of loads, and DEPENDENT clocks for each of a warp's instructions
and is replaced by the next. Mean value analysis (Reiser and Lavenberg, JACM 27, 1980) gives the
teams a second: few teams, or few bytes of each, leave memory idle while they wait; many keep it
busy. What a team reads again after more than the L2 cache holds comes from memory once more.

LATENCY and START were fitted, to 17 of the published times in peers.csv, and the H100's share of
bandwidth to the largest of them; the A100's is that of attention's model. The other times had no
part in these numbers, but the model's form, and which times to fit, were chosen with all in view.
START is what a timing by CUDA events with a cold L2 cache has in addition: launch, first loads, last
stores.

Not in it: that what all blocks read, such as a weight, may come from L1 and then sooner; that the
last blocks leave SMs idle; that SMs which run in step load at the same time. Nor does it judge
times under 15 us.
"""

import dataclasses

from .model import CLOCK, LAUNCH

LATENCY = 0.75e-6 # seconds, with memory busy
START = 8e-6      # seconds
DEPENDENT = 4     # clocks from an instruction to one that needs its result
LINK = 64         # bytes per clock from L2 to an SM


@dataclasses.dataclass(frozen=True)
class Launch:
    """Figures of benchmarks/launches.py, and bytes that are read `again`."""

    grid: float
    warps: int
    resident: int
    teams: int
    bytes: float
    asked: float
    instructions: float
    rounds: float
    again: float = 0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """seconds, without START; shares of them that memory and the SMs' own pipes are busy."""

    seconds: float
    memory: float
    pipes: float


def teams_per_second(sms, memory, own, waiting, teams):
    """Of a closed network with `teams` customers: one station for all (`memory` seconds a visit),
    one on each SM (`own` seconds), and a wait without a queue."""
    queue = queue_own = rate = 0.0
    for n in range(1, teams + 1):
        at_memory, at_own = memory * (1 + queue), own * (1 + queue_own)
        rate = n / (at_memory + at_own + waiting)
        queue, queue_own = rate * at_memory, rate * at_own / sms
    return rate


def estimate(gpu, launch):
    clock = gpu.clock * CLOCK
    blocks = min(launch.resident * gpu.sms, launch.grid)
    work = launch.grid * launch.teams  # teams that come and go
    moved = launch.bytes + (launch.again if launch.again / launch.grid * blocks > gpu.l2 else 0)
    memory = moved / (gpu.bandwidth * gpu.reached) / work
    issue = launch.instructions / 4 / work / clock
    link = launch.asked / LINK / work / clock
    own = (issue ** 2 + link ** 2) ** 0.5
    waiting = (launch.rounds * LATENCY
               + DEPENDENT * launch.instructions / (launch.grid * launch.warps) / clock)
    rate = teams_per_second(gpu.sms, memory, own, waiting, round(blocks * launch.teams))
    return Estimate(work / rate, rate * memory, rate * own / gpu.sms)


def seconds(gpu, launches):
    """Of launches one after the other, as timed by events with a cold L2 cache."""
    return (START + LAUNCH * (len(launches) - 1)
            + sum(estimate(gpu, launch).seconds for launch in launches))
