"""`python -m benchmarks run --backend vgpu`: the CUDA kernels without a GPU. Nothing is timed.

Rows labelled "counted" hold what the virtual A100 (tests/vgpu) counts of each kernel (counts.py,
attention_counts.py); they need an nvcc. Rows labelled "modelled" have the form of timed ones, with
times by the model of an A100 (a100/) and shares of the data sheet's limit. SOURCES lists the
functions that give them.
"""

from llama_ext.errors import LlamaExtError

from . import attention_counts, baseline, counts, result
from .a100 import report
from .a100.model import GPUS, causal_flops
from .a100.published import LENGTHS, TOKENS

GPU = "A100-80GB"
PEAK = 312e12  # FLOP/s of its tensor cores in bf16, by the data sheet
PEER = "flash-attn"


def counted(ops):
    """Rows of what the virtual A100 counts, as they come."""
    def row(op, shape, direction, figures):
        return {"op": op, "shape": shape, "dtype": "bf16", "direction": direction,
                "label": "counted", "figures": figures, "providers": {}, "left_out": {},
                "wrong": {}}
    for case in counts.CASES:
        if case.op in ops:
            yield row(case.op, case.shape, case.direction, counts.figures(case))
    if "attention" in ops:
        for D, parts in attention_counts.PARTS.items():
            for part in parts:
                yield row("attention", f"1 x {attention_counts.T}, d{D}", part.name,
                          attention_counts.machine_code(part, D) | attention_counts.traffic(part, D))


def modelled_attention(ops):
    """Rows of attention's modelled times, ours beside FlashAttention-2's, by the same model."""
    if "attention" not in ops:
        return
    figures, gpu = baseline.load()["attention"], GPUS[GPU]
    for D in attention_counts.PARTS:
        for T in LENGTHS:
            heads = report.heads(T, D)
            forward, backward = zip(report.our_seconds(gpu, T, D, figures),
                                    report.flash_attention_2_seconds(gpu, T, D))
            flops = causal_flops(T, D, heads)
            options = {"T": T, "S": T, "D": D, "H": heads * T // TOKENS}
            for direction, seconds, weight in (
                    ("forward", forward, 1), ("backward", backward, 2.5),
                    ("forward+backward", [f + b for f, b in zip(forward, backward)], 3.5)):
                work = weight * flops
                yield {"op": "attention", "shape": f"{TOKENS // T} x {T}, {options['H']} heads, d{D}",
                       "dtype": "bf16", "direction": direction, "label": "modelled",
                       "options": options, "unit": "FLOP", "work": work, "limit": "matmul",
                       "limit_rate": PEAK, "left_out": {}, "wrong": {},
                       "providers": {name: result.entry([s], work, work / PEAK)
                                     for name, s in zip((result.OURS, PEER), seconds)}}


SOURCES = (counted, modelled_attention)


def run(args):
    """Exit code of `python -m benchmarks run --backend vgpu`."""
    for name in ("peers", "sizes", "dtypes", "rounds", "threads"):
        if getattr(args, name) is not None:
            raise LlamaExtError(f"--{name}: expected none with --backend vgpu, which times nothing")
    result.check_outputs(args)
    counts.vgpu()  # before any op is called
    names = [result.OURS, PEER]
    about = {**result.machine("cpu", 0), "device": f"{GPU}, virtual", "label": "counted and modelled"}
    print(f"llama_ext {about['llama_ext']} ({about['commit'] or 'no git checkout'}) on a virtual "
          f"{GPU}: NOTHING IS TIMED")
    rows, shown = [], None
    for source in SOURCES:
        for row in source(args.ops or list(dict.fromkeys(case.op for case in counts.CASES))
                          + ["attention"]):
            rows.append(row)
            if row["label"] != shown:
                shown = row["label"]
                print(f"\n{shown.upper()}" + ("" if shown == "counted" else
                                              f"\n{result.columns(names)}"))
            print(line(row, names), flush=True)
    result.write(args, about, rows)
    return 0


def line(row, names):
    if row["label"] == "modelled":
        return result.line(row, names)
    figures = ", ".join(f"{name} {value:.4g}" for name, value in row["figures"].items()
                        if value is not None)
    return f"{row['op']:20} {row['shape']:34} {row['direction']:16} {figures}"
