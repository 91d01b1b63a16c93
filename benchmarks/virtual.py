"""`python -m benchmarks run --backend vgpu`: the CUDA kernels without a GPU. Nothing is timed.

Rows labelled "counted" hold what the virtual A100 (tests/vgpu) counts of each kernel (counts.py,
attention_counts.py); they need an nvcc. Rows labelled "modelled" have the form of timed ones, with
times by the models of an A100 (a100/) and shares of the data sheet's limit.
"""

from llama_ext.errors import LlamaExtError

from . import attention_counts, baseline, counts, providers, result
from .a100 import bandwidth_report, report
from .a100.model import GPUS, causal_flops
from .a100.published import LENGTHS, TOKENS

GPU = GPUS["A100-80GB"]
PEAK = 312e12  # FLOP/s of its tensor cores in bf16, by the data sheet
PEER = "flash-attn"


def _row(op, shape, direction, **rest):
    return {"op": op, "shape": shape, "dtype": "bf16", "direction": direction, "providers": {},
            "left_out": {}, "wrong": {}, **rest}


def counted(ops):
    """Rows of what the virtual A100 counts, as they come."""
    for case in counts.CASES:
        if case.op in ops:
            yield _row(case.op, case.shape, case.direction, label="counted",
                       figures=counts.figures(case))
    if "attention" not in ops:
        return
    for D, parts in attention_counts.PARTS.items():
        for part in parts:
            figures = attention_counts.machine_code(part, D) | attention_counts.traffic(part, D)
            yield _row("attention", f"1 x {attention_counts.T}, d{D}", part.name, label="counted",
                       figures=figures)


def _modelled(op, shape, direction, unit, work, limit, peak, seconds, **rest):
    """A row of modelled seconds, {provider: seconds}."""
    return _row(op, shape, direction, label="modelled", unit=unit, work=work, limit=limit,
                limit_rate=peak, **rest) | {
        "providers": {name: result.entry([s], work, work / peak) for name, s in seconds.items()}}


def modelled_attention(ops):
    """Rows of attention's modelled times, ours beside FlashAttention-2's, by the same model."""
    figures = baseline.load()["attention"]
    for D in attention_counts.PARTS if "attention" in ops else ():
        for T in LENGTHS:
            heads = report.heads(T, D)
            forward, backward = zip(report.our_seconds(GPU, T, D, figures),
                                    report.flash_attention_2_seconds(GPU, T, D))
            options = {"T": T, "S": T, "D": D} | dict.fromkeys(
                ("H", "Hkv"), heads * T // TOKENS)
            shape = f"{TOKENS // T} x {T}, {options['H']} heads, d{D}"
            for direction, seconds, weight in (
                    ("forward", forward, 1), ("backward", backward, 2.5),
                    ("forward+backward", [f + b for f, b in zip(forward, backward)], 3.5)):
                yield _modelled("attention", shape, direction, "FLOP",
                                weight * causal_flops(T, D, heads), "matmul", PEAK,
                                dict(zip((result.OURS, PEER), seconds)), options=options)


def modelled_bandwidth(ops):
    """Rows of the modelled times of the ops that memory limits."""
    for what, size, ms, rate, _ in bandwidth_report.ours(GPU, baseline.load()["launches"]):
        op, _, detail = what.partition(" ")
        if op in ops:
            direction = detail if detail in ("forward", "backward") else "forward"
            of = f"{detail} -> {size}" if op == "linear_int8" else f"{size} rows"
            yield _modelled(op, of, direction, "B", rate * 1e9 * ms / 1e3, "copy", GPU.bandwidth,
                            {result.OURS: ms / 1e3})


SOURCES = (counted, modelled_bandwidth, modelled_attention)


def run(args):
    """Exit code of `python -m benchmarks run --backend vgpu`."""
    for name in ("peers", "sizes", "dtypes", "rounds", "threads"):
        if getattr(args, name) is not None:
            raise LlamaExtError(f"--{name}: expected none with --backend vgpu, which times nothing")
    result.check_outputs(args)
    counts.vgpu()  # before any op is called
    names = [result.OURS, PEER]
    about = {**result.machine("cpu", 0), "device": f"{GPU.name}, virtual",
             "virtual": True}
    print(f"llama_ext {about['llama_ext']} ({about['commit'] or 'no git checkout'}) on a virtual "
          f"{GPU.name}: NOTHING IS TIMED; of each limit the data sheet's")
    rows, shown = [], None
    for source in SOURCES:
        for row in source(args.ops or providers.OURS):
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
