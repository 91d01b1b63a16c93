"""What this installation is and which kernels serve which tensors."""

import os
import platform

import torch

from . import memory


def info():
    """Versions, instruction sets, devices and memory settings, as a dict of plain values.

    cpu.isa: the instruction set whose kernels serve CPU tensors, the best of cpu.available unless
    the environment variable LLAMA_EXT_CPU_ISA names another. cuda.kernels: the GPU architectures
    this build has kernels for; a CUDA tensor given to an op raises when there are none.
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
            "kernels": "none in this build: ops take CPU tensors only",
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
