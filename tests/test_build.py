"""The package as others get it: an sdist that builds, one binary for any torch, clear refusals."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import llama_ext
import sass

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The unpacked sdist of this tree."""
    temp = tmp_path_factory.mktemp("sdist")
    run("setup.py", "-q", "egg_info", "--egg-base", temp, "sdist", "--dist-dir", temp, cwd=ROOT)
    with tarfile.open(next(temp.glob("*.tar.gz"))) as archive:
        archive.extractall(temp)
    return next(path for path in temp.iterdir() if (path / "setup.py").exists())


def run(*args, cwd, **env):
    """Runs Python there, with one GPU architecture to build for; what became of it."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, text=True, timeout=900,
                          env={**os.environ, "LLAMA_EXT_CUDA_ARCHS": "80", **env},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 or env, done.stdout
    return done


def test_the_sdist_holds_every_source(sources):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    if listed.returncode:
        pytest.skip("not a git checkout")
    apart = ("dev/", ".")  # the log of experiments, and what is for git and CI
    missing = [name for name in listed.stdout.split()
               if not name.startswith(apart) and not (sources / name).is_file()]
    assert missing == []


def test_the_sdist_builds_a_wheel_for_every_python_and_torch(sources, tmp_path):
    # Without optimisation, which takes most of the time and is no matter here.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    done = run("setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path, cwd=sources,
               CXX=str(compiler), NVCC_APPEND_FLAGS="-Xcicc=-O0 -Xptxas=-O0")
    assert done.returncode == 0, done.stdout
    wheel = next(tmp_path.glob("*.whl"))
    assert "-py3-none-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        names = archive.namelist()
    modules = [str(path.relative_to(ROOT)) for pattern in ("**/*.py", "mixtures/*.json")
               for path in ROOT.glob(f"llama_ext/{pattern}")]
    libraries = {"llama_ext/_C.so"}
    if subprocess.run([sys.executable, ROOT / "csrc/cuda/nvcc.py"]).returncode == 0:
        libraries.add("llama_ext/libllama_ext_cuda.so")
    assert {*modules, *libraries} == {n for n in names if n.startswith("llama_ext/")}
    symbols = subprocess.run(["nm", "-D", "--undefined-only", tmp_path / "llama_ext/_C.so"],
                             text=True, check=True, stdout=subprocess.PIPE).stdout.split()
    unstable = [s for s in symbols if s.startswith("_Z") and ("c10" in s or "2at" in s)
                or s.startswith("Py")]
    assert unstable == [] and any(s.startswith("aoti_torch_") for s in symbols)
    script = ("import llama_ext as lx, torch; print(lx.__file__); "
              "print(lx.swiglu(torch.ones(2), torch.ones(2)))")
    out = run("-c", script, cwd=tmp_path).stdout
    assert out.startswith(str(tmp_path / "llama_ext")) and "0.7311" in out


def test_no_kernel_spills_registers_on_any_architecture():
    library = Path(llama_ext.__file__).parent / "libllama_ext_cuda.so"
    if not library.exists() or sass.cuobjdump() is None:
        pytest.skip("no CUDA library, or no cuobjdump to look into it")
    assert len(sass.resources(library)) > 100
    assert sass.stack_frames(library) == []


def test_a_missing_compiler_is_one_sentence(sources):
    done = run("setup.py", "-q", "build_ext", cwd=sources, CXX="/nonexistent/c++")
    assert done.returncode == 1
    assert done.stdout == ("error: llama_ext: compiler: expected a C++20 compiler such as g++ 11 or"
                           " newer in CXX or on PATH, got /nonexistent/c++, which is not found\n")


def test_a_torch_too_old_is_one_sentence(sources, tmp_path):
    info = tmp_path / "torch-2.9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n")
    done = run("setup.py", "-q", "build_ext", cwd=sources, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == "error: llama_ext: torch: expected 2.10 or newer, got 2.9.1\n"


def test_a_compiler_error_is_shown_and_named(sources, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'what is wrong' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run("setup.py", "-q", "build_ext", cwd=sources, CXX=str(compiler))
    assert done.returncode == 1 and "what is wrong" in done.stdout
    assert f"error: llama_ext: the compiler failed: {compiler} " in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_says_what_it_needs(sources):
    for given, expected in (("PYTHON=/nonexistent/python", "expected Python 3.10 or newer with "
                             "venv, got /nonexistent/python"),
                            ("CXX=/nonexistent/c++", "expected a C++20 compiler in CXX or on PATH, "
                             "got /nonexistent/c++")):
        done = subprocess.run(["make", "test", f"{given}"], cwd=sources, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 2 and f"make: {expected}\n" in done.stdout, done.stdout
        assert not (sources / ".venv").exists()
