"""The CUDA library on the virtual A100: how its faults, its memory and its gaps reach Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sass

TESTS = Path(__file__).parent
SHIPPED = TESTS.parent / "llama_ext" / "libllama_ext_cuda.so"


def run(tmp_path, script):
    """What a script prints when run with python -m vgpu."""
    path = tmp_path / "script.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, "-m", "vgpu", "run", str(path), "argument"],
                          cwd=TESTS, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(TESTS.parent)})
    assert done.returncode == 0, done.stderr
    return done


def test_a_script_runs_on_it(tmp_path):
    done = run(tmp_path, "import sys, torch, llama_ext as lx\n"
                         "print(sys.argv[1:], lx.info()['cpu']['isa'],\n"
                         "      lx.rmsnorm(torch.full((2, 8), 3.0), torch.ones(8)).tolist()[1][7])")
    argument, kernels, *_, value = done.stdout.split()
    assert (argument, kernels) == ("['argument']", "CUDA") and abs(float(value) - 1) < 1e-6
    assert "rmsnorm_fwd_kernel" in done.stderr and "warp instructions" in done.stderr


SETUP = """
import torch, llama_ext as lx
def sentence(f, *args):
    try:
        f(*args)
    except RuntimeError as e:
        return str(e)
    return "no error"
w = torch.ones(64)
"""


def test_memory_is_known_to_the_byte(tmp_path):
    done = run(tmp_path, SETUP + """
print(sentence(lx.rmsnorm, torch.empty(2, 64), w))
x = torch.empty(2, 64)
x[:, :63] = 1; x[0, 63] = 1
print(sentence(lx.rmsnorm, x, w))
x[1, 63] = 1
print(sentence(lx.rmsnorm, x, w))
print(sentence(lx.rmsnorm, torch.zeros(127)[:64].as_strided((2, 64), (63, 1)), w))
import numpy as np
print(sentence(lx.rmsnorm, torch.from_numpy(np.ones((2, 64), np.float32)), w))
""").stdout.splitlines()
    assert "reads uninitialised global memory" in done[0]
    assert "thread (15, 1, 0)" in done[1] and "reads uninitialised global memory" in done[1]
    assert done[2:] == ["no error"] * 3  # the last: memory of numpy's
    assert done[0].startswith("rmsnorm: CUDA 800 failed to launch: kernel ")


@pytest.mark.parametrize("source, expected", [
    ("", "llama_ext: CUDA kernels: expected the library"),
    ("int x;", "llama_ext: CUDA kernels: expected lx_cuda_kernels in"),
    ("const int* lx_cuda_kernels(void) { static int version = 99; return &version; }",
     "llama_ext: CUDA kernels: expected version .* got 99; build both libraries together"),
    ('#include "api.h"\nconst Kernels* lx_cuda_kernels(void) {\n'
     '  static const Kernels k = {.version = kApiVersion, .name = "CUDA"}; return &k; }',
     "rmsnorm: CUDA has no kernel for this op yet"),
])
def test_a_library_that_does_not_fit_is_one_sentence(tmp_path, source, expected):
    library = tmp_path / "library.so"
    if source:
        (tmp_path / "library.c").write_text(source)
        subprocess.run(["cc", "-shared", "-fPIC", f"-I{TESTS.parent / 'csrc'}",
                        str(tmp_path / "library.c"), "-o", str(library)], check=True)
    done = subprocess.run([sys.executable, "-c", SETUP + "print(sentence(lx.rmsnorm, w, w))"],
                          capture_output=True, text=True, cwd=TESTS.parent,
                          env=os.environ | {"LLAMA_EXT_CPU_TENSORS_TO": str(library)})
    assert re.match(expected, done.stdout) and done.stdout.count("\n") == 1, done


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU, which would be given "
                    "the host's memory")
def test_the_shipped_library_says_that_there_is_no_driver():
    if not SHIPPED.exists():
        pytest.skip("built without nvcc")
    done = subprocess.run([sys.executable, "-c", SETUP + "print(sentence(lx.rmsnorm, w, w))"],
                          capture_output=True, text=True, cwd=TESTS.parent,
                          env=os.environ | {"LLAMA_EXT_CPU_TENSORS_TO": str(SHIPPED)})
    assert re.match(r"rmsnorm: CUDA [\d,]+ failed to launch: .*driver", done.stdout), done.stderr


def ptx_of(library, tool, folder):
    """A library's PTX for compute_80: a text for each kernel, and one for what stands before the
    first of a file. An unnamed namespace is named by a hash of the compile command; it is cut out,
    and nothing else is."""
    folder.mkdir()
    subprocess.run([tool, "-xptx", "all", str(library)], cwd=folder, check=True,
                   capture_output=True)
    texts = {}
    for path in folder.glob("*.sm_80.ptx"):
        text = re.sub(r"_GLOBAL__N__[0-9a-f]{8}_", "_GLOBAL__N__", path.read_text())
        head, *kernels = re.split(r"^(?=\.(?:\w+ \.)?entry )", text, flags=re.M)
        names = [re.search(r"\.entry (\S+?)\(", kernel)[1] for kernel in kernels]
        texts |= {f"before {names[0]}": head} if names else {}
        texts |= dict(zip(names, kernels))
    return texts


def test_the_shipped_ptx_is_what_the_virtual_a100_runs(tmp_path):
    from vgpu import library

    tool = sass.cuobjdump()
    if tool is None or not SHIPPED.exists():
        pytest.skip("no cuobjdump, on PATH or in the package triton" if SHIPPED.exists()
                    else "built without nvcc")
    shipped = ptx_of(SHIPPED, tool, tmp_path / "shipped")
    tested = ptx_of(library.library(), tool, tmp_path / "tested")
    assert len(tested) > 40
    differing = [name for name in shipped.keys() | tested.keys()
                 if shipped.get(name) != tested.get(name)]
    assert not differing, ("the library was built from other sources, or by another nvcc, than "
                           f"what the virtual A100 runs; build it again. Other PTX in {differing}")
