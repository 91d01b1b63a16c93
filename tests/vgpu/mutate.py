"""Plants faults in the CUDA kernels, one at a time, and shows which test or check catches each:

    python -m vgpu.mutate rmsnorm [--jobs 2] [--only TEXT]     (from tests/)

vgpu/mutations/<op>.py lists an op's faults. Ends with an error if one survives.
"""

import argparse
import concurrent.futures
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def plant(csrc, file, old, new):
    """Replaces the only occurrence of old in a source file."""
    path = csrc / "cuda" / file
    text = path.read_text()
    if text.count(old) != 1:
        raise ValueError(f"{file}: expected one occurrence, got {text.count(old)}: {old}")
    path.write_text(text.replace(old, new))


def how_caught(output):
    """One phrase from pytest's output: a fault of the virtual A100, or the failing test."""
    test = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+?\.py::\w+)", output, re.M)
    fault = re.search(r"failed to launch: (.*)", output)
    compiler = re.search(r"error\S*: (.*)", output) if "a command failed" in output else None
    if fault:
        reason = fault[1].split("`: ")[-1]
        return f"{'fault' if '`: ' in fault[1] else 'launch refused'}: {reason}"
    if compiler:
        return f"DOES NOT COMPILE: {compiler[1]}"
    return f"wrong: {test[1]}" if test else f"NO VERDICT: {output[-200:]}"


def run(tests, csrc):
    """How the tests fail on the kernels of csrc, None if they pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "--backend=vgpu",
         "-p", "no:cacheprovider", *tests],
        cwd=REPOSITORY, env=os.environ | {"VGPU_MUTANT": str(csrc)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return how_caught(done.stdout) if done.returncode else None


def run_fault(tests, fault, sound):
    """The name of a fault, its file, and how it was caught. sound: the folder of a run without one,
    whose objects serve for the files that are the same."""
    name, file, old, new = fault
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(sound, folder, dirs_exist_ok=True)
        plant(Path(folder) / "csrc", file, old, new)
        return name, file, run(tests, Path(folder) / "csrc")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only faults whose name has this text in it")
    args = parser.parse_args()
    op = importlib.import_module(f"vgpu.mutations.{args.op}")
    faults = [fault for fault in op.FAULTS if args.only in fault[0]]
    bad = 0
    with (tempfile.TemporaryDirectory() as sound,
          concurrent.futures.ThreadPoolExecutor(args.jobs) as pool):
        shutil.copytree(REPOSITORY / "csrc", Path(sound) / "csrc")
        if caught := run(op.TESTS, Path(sound) / "csrc"):
            sys.exit(f"the tests fail without a fault: {caught}")
        print("| fault | in | caught by |\n|-|-|-|")
        for name, file, caught in pool.map(lambda fault: run_fault(op.TESTS, fault, sound), faults):
            print(f"| {name} | {file} | {caught or 'SURVIVED'} |", flush=True)
            bad += caught is None or caught.isupper() or caught.startswith(("DOES NOT", "NO VERD"))
    print(f"{len(faults) - bad} of {len(faults)} caught")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
