"""What this installation is and which kernels serve which tensors."""

import os
import platform
from pathlib import Path

import torch

from . import memory

_CUDA_LIBRARY = Path(__file__).parent / "libllama_ext_cuda.so"


def _cuda_kernels():
    if not _CUDA_LIBRARY.exists():
        return ("none in this build, which found no nvcc: put that of CUDA 12.4 or newer on PATH "
                "or in CUDA_HOME, or pip install '.[nvcc]', and build again")
    return torch.ops.llama_ext.cuda_kernels()


def info():
    """Versions, instruction sets, devices and memory settings, as a dict of plain values.

    cpu.isa: the instruction set whose kernels serve CPU tensors, the best of cpu.available unless
    the environment variable LLAMA_EXT_CPU_ISA names another. cuda.kernels: the GPU architectures
    this build has machine code for (800 is sm_80; newer GPUs compile from PTX), or why there are
    none; a CUDA tensor given to an op then raises.
    """
    from . import __version__
    return {
        "llama_ext": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": {
            "isa": torch.ops.llama_ext.cpu_isa("?"),
            "available": torch.ops.llama_ext.cpu_isas().split(),
            "forced": os.environ.get("LLAMA_EXT_CPU_ISA"),
            "threads": torch.get_num_threads(),
            "freed memory": memory.status(),
        },
        "cuda": {
            "kernels": _cuda_kernels(),
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
