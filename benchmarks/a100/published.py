"""Measurements of kernels that are not ours, by their authors, and what their machine code has.

All: causal attention in bf16, 16,384 tokens in a batch, 2,048 wide (heads times head dim).
"""

from .model import Kernel

TOKENS, WIDTH = 16384, 2048
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)

# FlashAttention-2 (github.com/Dao-AILab/flash-attention): its kernels for sm_80, compiled with nvcc
# 13.0.88; blocks of an SM by registers and shared memory.
FLASH_ATTENTION_2 = {
    128: {"forward": Kernel(128, 64, 2, 914 / 256, 68 / 256, 0.62, 2, heavy_first=False),
          "backward": Kernel(128, 64, 5, 977 / 320, 32 / 320, 0.95, 1, of_keys=True,
                             heavy_first=False)},
    64: {"forward": Kernel(128, 128, 2, 1167 / 256, 132 / 256, 0.56, 2, heavy_first=False),
         "backward": Kernel(128, 128, 5, 1282 / 320, 64 / 320, 1.00, 1, of_keys=True,
                            heavy_first=False)}}

# Bytes for each of a tensor's elements that its backward moves in passes of their own: dout and o
# are read for their row sums, an fp32 dq is zeroed, and at last read and written as bf16.
FLASH_ATTENTION_2_PASSES = (4, 4, 6)

# Forward and backward together, TFLOP/s, from the charts in its repository.
FORWARD_AND_BACKWARD = {
    ("A100-80GB", 64): (88, 119, 140, 156, 165, 171),
    ("A100-80GB", 128): (99, 133, 155, 173, 182, 189),
    ("H100", 128): (163, 221, 265, 294, 308, 328),
}
# The forward alone, {T: TFLOP/s}, from FlashAttention-3's chart.
FORWARD = {("H100", 128): {2048: 298, 16384: 335}}
