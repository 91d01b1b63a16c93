"""What depends on the device a run is on: its choice, its precision, its memory and its peak."""

import re
import resource
import sys
import time

import torch

from .info import info

# What torch.cuda.get_device_name() contains, longer names first; FLOP/s in bf16, without sparsity,
# and in fp32 (NVIDIA's data sheets), that of CUDA cores, since torch leaves TF32 off.
_PEAKS = (("A100", 312e12, 19.5e12),
          ("H100 PCIe", 756e12, 51e12), ("H100 NVL", 835e12, 60e12), ("H100", 989e12, 67e12),
          ("H200 NVL", 835e12, 60e12), ("H200", 989e12, 67e12))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name):
    """The torch.device meant by "auto" (CUDA where there is one), "cpu" or "cuda".

    Raises ValueError for "cuda" where torch has none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: expected auto or cpu where torch sees no CUDA device, got "
                         "'cuda'")
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def resolve_dtype(name, device):
    """"bf16" or "fp32"; name "auto": bf16 where the device has instructions for it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if "avx512_bf16" in info()["cpu"]["available"] else "fp32"


def data_sheet_peak(name, dtype):
    """Dense FLOP/s in dtype "bf16" or "fp32" of the GPU `name`: an A100, H100 or H200; None for
    another."""
    for part, bf16, fp32 in _PEAKS:
        if part in name:
            return bf16 if dtype == "bf16" else fp32
    return None


def peak_flops(device, dtype):
    """The most FLOP/s that `device` reaches in dtype "bf16" or "fp32"; None where unknown.

    A GPU's is its data sheet's. A CPU's is measured, with torch's threads: the best of the
    products of matrices of 1024 x 1024 in half a second. A share of it is thus one of what this
    machine did just then.
    """
    if device.type == "cuda":
        return data_sheet_peak(torch.cuda.get_device_name(device), dtype)
    n = 1024
    a = torch.ones(n, n, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    best, end = float("inf"), time.perf_counter() + 0.5
    while (start := time.perf_counter()) < end:
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


def peak_memory(device):
    """Most bytes in use so far: of tensors on a GPU, of the whole process (RSS) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # getrusage counts what the parent held when it started this process
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
    except (OSError, TypeError):  # not Linux, or without that line
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_device(tensors, device):
    """The CPU tensors on `device`; to a GPU the copy does not hold up the CPU."""
    if device.type == "cpu":
        return tensors
    return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
