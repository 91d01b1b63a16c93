"""Builds llama_ext/_C.so: torch's stable C ABI only, no Python ABI, one binary for torch >= 2.10;
and, where there is nvcc, llama_ext/libllama_ext_cuda.so, which knows no torch.

The headers come from the torch that is already installed, in a build-isolated install too, so that
no second torch is downloaded; where there is none, pip brings one for the build.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

sys.path.append("csrc/cuda")
import nvcc  # noqa: E402

NAMES = ["llama_ext._C", "llama_ext.libllama_ext_cuda"]
OLDEST_TORCH = (2, 10)
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = AVX2 + ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"plain": []}
if os.uname().machine == "x86_64":
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512 + ["-mavx512bf16"],
             "amx": AVX512 + ["-mavx512bf16", "-mamx-tile", "-mamx-bf16"]}
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
         "-Wno-missing-field-initializers", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


def find_torch():
    """(folder, version) of the newest-searched installed torch, or None."""
    site_packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for path in [*sys.path, *site_packages]:
        for torch in distributions(name="torch", path=[path]):
            return Path(torch.locate_file("torch")), torch.version
    return None


class BuildExt(build_ext):
    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, ext):
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if ext.name == NAMES[1]:  # after _C, which compiles for both
            objects = [f"{self.build_temp}/{source.name}.o" for source in nvcc.SOURCES]
            return self.call(nvcc.link_command(objects, target))
        found = find_torch()
        if found is None or tuple(map(int, found[1].split(".")[:2])) < OLDEST_TORCH:
            raise PlatformError("llama_ext: torch: expected 2.10 or newer, got "
                                f"{found[1] if found else 'none'}")
        torch, compiler = found[0], os.environ.get("CXX", "g++")
        if shutil.which(compiler.split()[0]) is None:
            raise PlatformError("llama_ext: compiler: expected a C++20 compiler such as g++ 11 or "
                                f"newer in CXX or on PATH, got {compiler}, which is not found")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        jobs = [("csrc/cpu/kernels.cpp", objects / f"kernels_{isa}.o", [f"-DLX_ISA={isa}", *flags])
                for isa, flags in ISAS.items()]
        jobs += [(str(source), objects / f"{source.stem}.o",
                  ["-isystem", f"{torch}/include", "-DTORCH_TARGET_VERSION=0x020a000000000000"])
                 for source in sorted(Path("csrc/torch").glob("*.cpp"))]
        commands = [[*compiler.split(), *FLAGS, *flags, "-c", source, "-o", str(target)]
                    for source, target, flags in jobs]
        commands += [nvcc.compile_command(source, objects / f"{source.name}.o")
                     for source in nvcc.SOURCES if nvcc.find()]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(self.call, commands))
        self.call([*compiler.split(), "-shared", *[str(job[1]) for job in jobs], "-o", target,
                   f"-L{torch}/lib", "-ltorch_cpu", "-Wl,--exclude-libs,ALL", "-Wl,-z,defs"])
        if not nvcc.find():
            print(f"llama_ext: {nvcc.ABSENT}", file=sys.stderr)

    def call(self, command):
        begin = time.monotonic()
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        sys.stderr.write(done.stderr)
        built = command[command.index("-o") + 1]
        print(f"{time.monotonic() - begin:5.1f} s  {built}", file=sys.stderr)
        if done.returncode:
            raise CompileError(f"llama_ext: the compiler failed: {' '.join(command)}")


class Wheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=[Extension(name, sources=[]) for name in NAMES[:2 if nvcc.find() else 1]],
      cmdclass={"build_ext": BuildExt, "bdist_wheel": Wheel},
      setup_requires=[] if find_torch() else ["torch>=2.10"])
