"""Freed memory is kept and used again, and lx.info() says so."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
import llama_ext as lx
from llama_ext import memory
if {reuse}:
    assert memory.reuse_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(64 << 18)  # 64 MiB: 16384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(16):  # glibc's caches of small pieces fill up first
    faults()
print(faults() + faults(), lx.info()["cpu"]["freed memory"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_large_tensor_takes_the_memory_of_the_one_before():
    results = {}
    for reuse in (False, True):
        out = subprocess.run([sys.executable, "-c", SCRIPT.format(reuse=reuse)], text=True,
                             check=True, stdout=subprocess.PIPE).stdout
        faults, status = out.split(" ", 1)
        results[reuse] = int(faults), status.strip()
    assert results[True][0] < 100 and results[True][0] * 10 < results[False][0], results
    assert results[True][1].startswith("kept and re-used")
    assert results[False][1].startswith("glibc's default")
