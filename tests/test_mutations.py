"""The lists of planted faults (vgpu/mutate.py) fit the kernels as they are."""

import importlib
from pathlib import Path

import pytest

import vgpu

MUTATIONS = Path(vgpu.__file__).parent / "mutations"
CUDA = Path(__file__).parent.parent / "csrc" / "cuda"


@pytest.mark.parametrize("op", sorted(path.stem for path in MUTATIONS.glob("[a-z]*.py")))
def test_every_fault_can_be_planted(op):
    faults = importlib.import_module(f"vgpu.mutations.{op}").FAULTS
    assert len({name for name, *_ in faults}) == len(faults) >= 15
    for name, file, old, new in faults:
        assert (CUDA / file).read_text().count(old) == 1 and old != new, name
