"""The static figures of the CUDA kernels, kept in baseline.json: registers of every kernel for
sm_80, traffic of the ops (counts.py), hot loops and traffic of attention (attention_counts.py),
and what the model of bandwidth-bound launches needs (launches.py).

tests/test_cuda_baseline.py fails where one has become worse; `python -m benchmarks counts --save`
renews the file.
"""

import json
import subprocess
from pathlib import Path

from llama_ext.files import write_atomically

from . import attention_counts, counts
from . import launches as launch_counts

PATH = Path(__file__).with_name("baseline.json")
TOLERANCE = 1.02
MORE_IS_BETTER = ("in flight", "blocks", "resident", "teams")


def load():
    return json.loads(PATH.read_text())


def save():
    text = json.dumps(measure(), indent=1, sort_keys=True) + "\n"
    write_atomically(PATH, text.encode())


def measure():
    """{"nvcc": version, and {group: {what: {figure: number}}} for each group of figures}."""
    return {"nvcc": nvcc_version(), "kernels": kernels(), "ops": ops(), "attention": attention(),
            "launches": launches()}


def nvcc_version():
    """As nvcc names its release and build; the figures of another may differ."""
    library, _ = counts.vgpu()
    text = subprocess.run([*library.nvcc.find(), "--version"], text=True, capture_output=True,
                          check=True).stdout
    return text.split("release ")[1].split("\n")[0]


def kernels():
    library, machine_code = counts.vgpu()
    found = {name: use for source in library.nvcc.SOURCES for name, use in
             machine_code.resources(library.CSRC / "cuda" / source.name).items()}
    plain = subprocess.run(["c++filt", *found], text=True, capture_output=True, check=True).stdout
    return {name.replace("(anonymous namespace)::", "").replace("lx::", "").replace("void ", "")
            .rsplit("(", 1)[0]:
            {"registers": use["registers"], "spilled bytes": use["stack"] + use["local"]}
            for name, use in zip(plain.splitlines(), found.values())}


def ops():
    return {f"{case.op} {case.direction} {case.shape}":
            {name: number for name, number in counts.figures(case).items() if number is not None}
            for case in counts.CASES}


def attention():
    of = attention_counts
    return {f"{part.name} d{D}": of.machine_code(part, D) | of.traffic(part, D)
            for D, parts in of.PARTS.items() for part in parts}


def launches():
    return {name: figures for scaled in launch_counts.CASES
            for size in scaled.sizes
            for name, figures in launch_counts.measure(scaled, size).items()}


def worse(before, now):
    """A sentence for each figure of {what: {figure: number}} that is worse by more than 2 %, or
    that only one of both has."""
    found = [f"{what}: expected it in both, got it in one" for what in before.keys() ^ now.keys()]
    for what in before.keys() & now.keys():
        for name in before[what].keys() | now[what].keys():
            old, new = before[what].get(name), now[what].get(name)
            if old is None or new is None:
                found.append(f"{what}: {name}: expected it in both, got it in one")
            elif (new * TOLERANCE < old if name in MORE_IS_BETTER else new > old * TOLERANCE):
                found.append(f"{what}: {name}: expected {old:.4g}, got {new:.4g}")
    return sorted(found)
