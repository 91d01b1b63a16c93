"""Builds the engine with ninja, into build/vgpu/ of the repository.

Nothing is run if neither a source, this file, the compiler nor Python changed since the last build,
which a hash beside the result tells; otherwise ninja compiles what needs it."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent.parent / "build" / "vgpu"
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-pthread",
         "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-missing-field-initializers"]


def compiler():
    return os.environ.get("CXX", "g++").split()


def fingerprint(sources):
    digest = hashlib.sha256()
    for source in [Path(__file__), *sources]:
        digest.update(source.name.encode() + source.read_bytes())
    native = subprocess.run([*compiler(), "-march=native", "-Q", "--help=target"],
                            capture_output=True, text=True)
    digest.update(f"{compiler()} {native.stdout} {sys.version}".encode())
    return digest.hexdigest()


def ninja():
    beside_python = Path(sys.executable).parent / "ninja"
    return str(beside_python) if beside_python.exists() else shutil.which("ninja") or "ninja"


def ninja_file(sources, target):
    import pybind11

    includes = [f"-isystem {path}" for path in
                (sysconfig.get_path("include"), pybind11.get_include())]
    units = [source for source in sources if source.suffix == ".cpp"]
    objects = [f"{unit.stem}.o" for unit in units]
    return "\n".join([
        f"flags = {' '.join(FLAGS + includes)}",
        "rule cc",
        f"  command = {' '.join(compiler())} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {' '.join(compiler())} -shared -pthread $in -o $out.part && "
        "mv $out.part $out",
        "rule archive",
        "  command = rm -f $out && ar rcs $out $in",
        *[f"build {unit.stem}.o: cc {unit}" for unit in units],
        f"build libvgpu.a: archive {' '.join(o for o in objects if o != 'python.o')}",
        f"build {target.name}: link python.o libvgpu.a", ""])


def library():
    """The engine as a static library, libvgpu.a, for programs without Python; see csrc/engine.h."""
    return build().with_name("libvgpu.a")


def build():
    """The path of the built extension module."""
    sources = sorted((HERE / "csrc").iterdir())
    target = FOLDER / f"_engine{sysconfig.get_config_var('EXT_SUFFIX')}"
    built, key = FOLDER / "fingerprint", fingerprint(sources)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and built.exists() and built.read_text() == key:
            return target
        (FOLDER / "build.ninja").write_text(ninja_file(sources, target))
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        done = subprocess.run([ninja(), "-C", str(FOLDER), "-j", jobs, "--quiet"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"vgpu: the engine does not compile\n{done.stdout}")
        built.write_text(key)
    return target
