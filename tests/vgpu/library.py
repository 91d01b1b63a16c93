"""Builds the CUDA library for the virtual A100: its own sources, as nvcc compiles them for sm_80,
linked with standin/ instead of the CUDA runtime. Cached by content in build/vgpu/."""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import torch

from . import build

STANDIN = build.HERE / "standin"
# mutate.py has kernels of its own: a changed copy of csrc/, compiled to PTX alone, kept beside it.
MUTANT = os.environ.get("VGPU_MUTANT")
CSRC = Path(MUTANT or build.HERE.parent.parent / "csrc")
FOLDER = CSRC.parent / "build" / "vgpu"
CODE = "compute_80" if MUTANT else "[sm_80,compute_80]"


def _load_nvcc():
    spec = importlib.util.spec_from_file_location("nvcc", CSRC / "cuda" / "nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


nvcc = _load_nvcc()


def _run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"vgpu: a command failed: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def _cached(suffix, command, inputs, folder=FOLDER):
    """The file that command(output) makes of the inputs, made once for their content."""
    text = " ".join(map(str, command("OUT"))).replace(str(CSRC), "csrc")
    digest = hashlib.sha256(text.encode())
    for path in inputs:
        digest.update(path.name.encode() + path.read_bytes())
    output = folder / f"{digest.hexdigest()[:24]}{suffix}"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = output.with_name(f"{os.getpid()}-{output.name}")
        _run(command(part))
        part.rename(output)
    return output


def _nvcc_command():
    if nvcc.find() is None:
        raise RuntimeError(f"vgpu: {nvcc.ABSENT}")
    return nvcc.find()


def compile_ptx(source, *flags):
    """The text of the PTX that nvcc makes of a CUDA file for compute_80."""
    return _cached(".ptx", lambda out: [
        *_nvcc_command(), "-std=c++17", "-arch=compute_80", "-ptx", *flags, str(source),
        "-o", str(out)], [source]).read_text()


def kernel_object(source):
    """An object file with machine code for sm_80 and its PTX as plain text."""
    headers = [CSRC / "api.h", *sorted((CSRC / "cuda").glob("*.cuh"))]
    return _cached(".cu.o", lambda out: [
        *_nvcc_command(), *nvcc.FLAGS, *nvcc.compress_none(),
        f"-gencode=arch=compute_80,code={CODE}", "-c", str(source), "-o", str(out)],
        [source, *headers])


def library():
    """The path of the library."""
    site = Path(torch.__file__).parent
    flags = [*build.compiler(), *build.FLAGS, f"-I{build.HERE / 'csrc'}", "-isystem",
             str(site / "include")]
    headers = [*sorted(STANDIN.glob("*.h")), build.HERE / "csrc" / "engine.h"]
    objects = [kernel_object(CSRC / "cuda" / source.name) for source in nvcc.SOURCES]
    for source in sorted(STANDIN.glob("*.cpp")):
        objects.append(_cached(".o", lambda out: [*flags, "-c", str(source), "-o", str(out)],
                               [source, *headers], build.FOLDER))
    engine = build.library()
    return _cached(".so", lambda out: [
        *build.compiler(), "-shared", "-pthread", *map(str, objects), str(engine), "-o", str(out),
        f"-L{site / 'lib'}", "-lc10", f"-Wl,-rpath,{site / 'lib'}", "-Wl,-z,defs"],
        [engine])


def activate(threads=0):
    """From now on CPU tensors are served by the CUDA kernels on the virtual A100, by so many
    threads (0: one per core). To be called before the first op. The bounds of tensors made earlier
    are not known."""
    os.environ["LLAMA_EXT_CPU_TENSORS_TO"] = str(library())
    _loaded().vgpu_own_torch_memory()
    _loaded().vgpu_set_threads(threads)


def _loaded():
    loaded = ctypes.CDLL(os.environ["LLAMA_EXT_CPU_TENSORS_TO"])
    loaded.vgpu_take_log.restype = ctypes.c_char_p
    loaded.vgpu_run_edges.argtypes = [ctypes.c_double]
    loaded.vgpu_set_seed.argtypes = [ctypes.c_uint64]
    return loaded


def take_log():
    """One dict for each launch since the last call: kernel, grid, block and the counters."""
    return json.loads(_loaded().vgpu_take_log())


@contextlib.contextmanager
def edges(share):
    """Within it launches run only the first and the last of their blocks, `share` of the grid at
    each end, rounded up: for tensors too large to run through."""
    _loaded().vgpu_run_edges(share)
    try:
        yield
    finally:
        _loaded().vgpu_run_edges(1)


@contextlib.contextmanager
def seeded(seed):
    """Within it the order of blocks and warps is that of another seed than 0."""
    _loaded().vgpu_set_seed(seed)
    try:
        yield
    finally:
        _loaded().vgpu_set_seed(0)
