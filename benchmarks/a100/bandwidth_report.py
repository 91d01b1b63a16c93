"""The ops that memory limits, the second part of `python -m benchmarks a100`: again first the
check, beside what Liger-Kernel's authors measured, then ours."""

from .. import baseline
from ..launches import CASES
from . import peers
from .bandwidth import START, Launch, estimate, seconds
from .model import GPUS

ROWS = (2048, 4096, 8192, 16384)
OUTPUTS = (4096, 11008, 32000)  # of linear_int8, 4096 inputs


def interpolate(figures, case, size):
    """([Launch], bytes that the op must move) of a case at any size. figures: the group "launches"
    of baseline.json."""
    small, large = case.sizes
    share = (size - small) / (large - small)
    found = []
    while (low := figures.get(f"{case.name}, {small}, {len(found) + 1}")) is not None:
        high = figures[f"{case.name}, {large}, {len(found) + 1}"]
        found.append({name: low[name] + share * (high[name] - low[name]) for name in low})
    must = [launch.pop("must") for launch in found][0]
    return [Launch(**launch) for launch in found], must


def limit(gpu, launches):
    """Of the launch that takes longest."""
    found = max((estimate(gpu, launch) for launch in launches), key=lambda e: e.seconds)
    busy = f"memory {found.memory:.0%}, SMs {found.pipes:.0%} busy"
    return busy if max(found.memory, found.pipes) > 0.9 else f"latency: {busy}"


def ours(gpu, figures):
    """[(what, size, ms, GB/s, what limits it)], modelled."""
    rows = []
    for case in CASES:
        for size in OUTPUTS if case.name.startswith("linear_int8") else ROWS:
            launches, must = interpolate(figures, case, size)
            took = seconds(gpu, launches)
            rows.append((case.name, size, 1e3 * took, must / took / 1e9, limit(gpu, launches)))
    return rows


def beside_liger(gpu, table):
    """[(what, ms of Liger's, ms of ours)] at the most rows. table: of ours()."""
    mine = {what: ms for what, size, ms, *_ in table if size == ROWS[-1]}
    mine["cross_entropy both"] = mine["cross_entropy forward"] + mine["cross_entropy backward"]
    return [(what, ms, mine[what]) for what, ms in peers.at_llama_shapes(gpu).items()]


def run(gpu):
    print(f"\n{__doc__}\n\nLiger-Kernel, published and modelled, ms")
    print(f"{'GPU':10} {'':28} {'of':14} {'published':>9} {'modelled':>8} {'error':>6}")
    for row in peers.check():
        kind = "  fitted" if (row.gpu, row.what) in peers.FITTED else ""
        print(f"{row.gpu:10} {row.what:28} {row.of:14} {row.ms:9.4f} {row.modelled:8.4f} "
              f"{row.error:+6.1%}{kind}")
        if row.wrong:
            print(f"{'':10} {row.wrong}")
    print(f"\nllama_ext on {gpu.name}, bf16, widths of LLaMA 7B: MODELLED, {1e6 * START:.0f} us of "
          f"a timing's start in each\n(of a peak of {gpu.bandwidth / 1e9:,.0f} GB/s a copy reaches "
          f"{gpu.reached:.0%}; linear_int8: outputs, not rows)")
    print(f"{'':26} {'rows':>6} {'ms':>8} {'GB/s':>6} {'of peak':>7}  limited by")
    table = ours(gpu, baseline.load()["launches"])
    for what, size, ms, rate, why in table:
        print(f"{what:26} {size:6} {ms:8.4f} {rate:6.0f} {1e9 * rate / gpu.bandwidth:7.1%}  {why}")
    if gpu.sms != GPUS["A100-80GB"].sms:
        return  # Liger's grid depends on it
    print(f"\n{ROWS[-1]:,} rows: MODELLED ms, Liger-Kernel 0.8.1 and llama_ext")
    for what, liger, mine in beside_liger(gpu, table):
        print(f"{what:26} {liger:8.4f} {mine:8.4f}")
