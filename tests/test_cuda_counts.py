"""What the CUDA kernels ask of an A100 (benchmarks/counts.py) stays at what the ops must move, and
their machine code for sm_80 keeps loads under way and spills nothing."""

import re
import sys
from pathlib import Path

import pytest

import sass

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import counts  # noqa: E402


pytestmark = pytest.mark.usefixtures("vgpu")


@pytest.fixture
def machine_code(vgpu):
    from vgpu import machine_code
    if sass.cuobjdump() is None:
        pytest.skip("no cuobjdump, on PATH or in the package triton")
    return machine_code


every_case = pytest.mark.parametrize("case", counts.CASES,
                                     ids=lambda c: f"{c.op}-{c.direction}-{c.shape}")


@every_case
def test_traffic(case):
    got = counts.count(case)
    assert got.bytes <= (1.02 if case.direction == "forward" else 1.05)
    # Every row of rmsnorm asks for the weight, in the backward twice; every 16 outputs of
    # linear_int8 for x, half a sector at a time.
    int8 = case.op == "linear_int8"
    assert got.asked <= (2 if int8 else 1.75 if case.op.startswith("rmsnorm") else 1.15)
    # Rows of odd width begin within a sector: a request of 512 bytes then touches 17, not 16.
    assert got.sectors <= (1.5 if int8 else 1.04 if case.shape.endswith("32001") else 1.02)
    assert got.shared is None or got.shared <= (1.5 if int8 else 1.01)  # int8: sums, at the end
    assert got.per_kib < 250


@every_case
def test_loads_in_flight(machine_code, summary, case):
    summary.append(counts.line(case))
    assert counts.figures(case)["in flight"] >= 32


def test_rounds_of_loads(machine_code):
    """Two loads at once, one that waits for them, two at once of half the width."""
    code = ["LDG.E.NA.128.CONSTANT R4, [R2.64]", "LDG.E.128 R8, [R2.64+0x10]", "FADD R1, R4, R8",
            "LDG.E.128 R12, [R2.64]", "FMUL R1, R15, R1", "LDG.E.64 R16, [R2.64]",
            "LDG.E.U16 R18, [R2.64]", "FADD R1, R17, R1"]
    for times in (1, 5):  # a warp's three loads of 16 bytes a lane
        assert machine_code.load_rounds(code, times * 3 * 512) == 2 * times + 1
    assert machine_code.load_rounds(code, 100) == 3
    assert machine_code.load_rounds(code[2:3], 0) == 0


def source_names():
    folder = Path(__file__).parent.parent / "csrc" / "cuda"
    return sorted(path.name for path in folder.glob("*.cu"))


@pytest.mark.parametrize("name", source_names())
def test_machine_code_spills_nothing_and_moves_16_bytes(vgpu, machine_code, summary, name):
    source = vgpu.CSRC / "cuda" / name
    resources, code = machine_code.resources(source), machine_code.instructions(source)
    assert resources.keys() == code.keys()
    for kernel, found in resources.items():
        assert (found["stack"], found["local"]) == (0, 0), kernel
        assert not [text for text in code[kernel] if re.match(r"LDL|STL", text)], kernel
        # Names have the template's types and numbers: of elements moved at once, where it has any.
        vector = re.search(r"(?:float|double|half|bfloat16|[fd]|S\d?_)Li(\d)E", kernel)
        if vector and int(vector[1]) > 1:
            for access in ["LDG"] if "delta" in kernel else ["LDG", "STG"]:  # delta: sums of rows
                assert [t for t in code[kernel] if re.match(rf"{access}\S*\.128", t)], kernel
    if resources:
        summary.append(f"{name} for sm_80: {len(resources)} kernels, at most "
                       f"{max(f['registers'] for f in resources.values())} registers, no spill, no "
                       "local memory")
