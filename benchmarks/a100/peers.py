"""Published times of kernels that memory limits, not ours, beside what they ask of a GPU.

peers.csv: the times (ms, medians) are Liger-Kernel's, measured by its authors on an A100-SXM4-80GB
in September 2024 and on an H100-80GB-HBM3 in 2025 and 2026 (github.com/linkedin/Liger-Kernel,
benchmark/data/all_benchmark_data.csv). What a launch asks was counted on the virtual A100, each
block's share, from the kernels of the releases of that time (0.2.1, 0.3.0, 0.6.0, 0.7.0, 0.8.0,
0.8.1), compiled with their launch parameters by Triton 3.9 for sm_80, for the H100 too; Triton 3.0
or ptxas of then may have given other registers. again: bytes read once more at the row's end;
other: bytes that PyTorch moves in passes of its own (sums of partial gradients; a copy of the
gradient that two inputs share). Lines without a time: Liger 0.8.1 at LLaMA 7B's widths, for an
A100, to be modelled beside ours; its cross_entropy makes the gradient in the forward.

Left out, and why:
  rms_norm backward, A100     a fifth of its bytes is PyTorch's sum over rows, of unknown speed
  backward under 0.13 ms      the same time at every width: the CPU's, not the GPU's
  kernels that spill          the counts are of PTX, which does not know what is spilled
  rope of head dim 16 and 64  lanes that do the same work twice race; 10 and 20 us
  swiglu, geglu on the A100   times of a whole feed-forward layer with its matrix products
  cross_entropy "full"        most of it is PyTorch's accumulation of the gradient
  megatron_* backward         a forward and a copy of the expanded gradient are in it
"""

import csv
import dataclasses
from pathlib import Path

from .bandwidth import Launch, seconds
from .model import GPUS, LAUNCH

# Those that the three numbers were fitted to.
FITTED = {("A100-80GB", "layer_norm forward"), ("A100-80GB", "cross_entropy forward"),
          ("H100", "swiglu forward")}

# Where the model is wrong by more than 15 %, and what may be the cause.
WRONG = {
    ("H100", "layer_norm forward", "4096x16384"):
        "Triton 3.9 gives a thread 124 registers, so one block an SM; the time looks like two",
    ("H100", "layer_norm backward", "4096x4096"):
        "4 warps an SM, rows one by one: all SMs load at the same time, then all compute",
    ("H100", "relu_squared forward", "4096x1024"):
        "11 us, of which START is 8: it is less on an H100",
}


@dataclasses.dataclass(frozen=True)
class Row:
    gpu: str
    what: str
    of: str
    ms: float        # published
    modelled: float  # ms

    @property
    def error(self):
        return self.modelled / self.ms - 1

    @property
    def wrong(self):
        """Why the model is, or None."""
        return WRONG.get((self.gpu, self.what, self.of))


def lines():
    """[{column: text}]"""
    with open(Path(__file__).with_name("peers.csv"), newline="") as file:
        return list(csv.DictReader(file))


def modelled(gpu, line):
    """ms"""
    grid, size, again, asked, instructions, other = (float(line[name]) for name in (
        "grid", "bytes", "again", "asked", "instructions", "other"))
    launch = Launch(grid, int(line["warps"]), int(line["resident"]), int(line["teams"]),
                    size * grid, asked * grid, instructions * grid, float(line["rounds"]),
                    again * grid)
    passes = other / (gpu.bandwidth * gpu.reached) + (2 * LAUNCH if other else 0)
    return 1e3 * (seconds(gpu, [launch]) + passes)


def check():
    """[Row] of every published time."""
    return [Row(line["gpu"], line["what"], line["of"], float(line["ms"]),
                modelled(GPUS[line["gpu"]], line)) for line in lines() if line["ms"]]


def at_llama_shapes(gpu):
    """{what: ms} of Liger's kernels, 16,384 rows."""
    return {line["what"]: modelled(gpu, line) for line in lines() if not line["ms"]}
