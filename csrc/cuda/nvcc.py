"""Finds nvcc and says how it compiles and links the CUDA library; for setup.py and the tests. As a
script: exit code 0 when there is an nvcc."""

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ARCHS = os.environ.get("LLAMA_EXT_CUDA_ARCHS", "80;86;89;90")
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
SOURCES = sorted(Path(__file__).parent.glob("*.cu"))
ABSENT = ("no nvcc was found, so that the CUDA kernels are not built: put that of CUDA 12.4 or "
          "newer on PATH or in CUDA_HOME, or get it from PyPI with `pip install '.[nvcc]'`, and "
          "build again")


@functools.cache
def find():
    """The command of nvcc: CUDA_HOME's, PATH's or that of the PyPI packages; None without."""
    wheels = [Path(path) / "nvidia" / "cu13"
              for path in dict.fromkeys([*sys.path, sysconfig.get_path("purelib")]) if path]
    home = os.environ.get("CUDA_HOME")
    for nvcc in [home and Path(home) / "bin" / "nvcc", shutil.which("nvcc"),
                 *(wheel / "bin" / "nvcc" for wheel in wheels)]:
        if nvcc and Path(nvcc).exists():
            root = Path(nvcc).parent.parent
            # The packages have their libraries in lib, nvcc looks in lib64.
            return [str(nvcc)] + ([f"-L{root}/lib"] if root in wheels else [])
    return None


@functools.cache
def _output(*arguments):
    return subprocess.run([*find(), *arguments], capture_output=True, text=True, check=True).stdout


def known_archs():
    return [int(arch) for arch in re.findall(r"compute_(\d+)$", _output("--list-gpu-arch"), re.M)]


def compress_none():
    """The flags under which PTX lies in an object file as plain text."""
    text = _output("--help")
    return (["--compress-mode=none"] if "--compress-mode" in text else
            ["--no-compress"] if "--no-compress" in text else [])


def compile_command(source, target):
    """Machine code for each of ARCHS that this nvcc knows; PTX of compute_80 and of the newest."""
    archs = sorted({int(arch) for arch in ARCHS.replace(",", ";").split(";")} & {*known_archs()})
    if not archs:
        raise RuntimeError(f"llama_ext: LLAMA_EXT_CUDA_ARCHS: expected some of {known_archs()}, "
                           f"got {ARCHS}")
    codes = [(arch, f"sm_{arch}") for arch in archs]
    codes += [(arch, f"compute_{arch}") for arch in sorted({80, archs[-1]} & {*known_archs()})]
    return [*find(), *FLAGS, *(f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes),
            "-c", str(source), "-o", str(target)]


def link_command(objects, target):
    return [*find(), "-shared", "-cudart=static", *map(str, objects), "-o", str(target),
            "-Xlinker=--exclude-libs,ALL"]


if __name__ == "__main__":
    sys.exit(find() is None)
