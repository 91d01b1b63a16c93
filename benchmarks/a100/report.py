"""Modelled times of attention, and of the ops that memory limits, on an A100 or H100: `python -m
benchmarks a100`.

First the check: what the model says of FlashAttention-2's kernels, beside what their authors
measured. Then ours, from the figures in benchmarks/baseline.json; no GPU has run them.
"""

from .. import baseline
from ..attention_counts import PARTS
from . import bandwidth_report, published
from .model import GPUS, Kernel, causal_flops, copy_seconds, kernel_seconds
from .published import LENGTHS, TOKENS, WIDTH

DELTA_BYTES = 4  # of dout and o, for each of their elements, read once for their row sums


def heads(T, D):
    """Of all sequences of T tokens in a batch together."""
    return WIDTH // D * TOKENS // T


def flash_attention_2_seconds(gpu, T, D):
    """(forward, backward)"""
    forward, backward = (kernel_seconds(gpu, published.FLASH_ATTENTION_2[D][name], T, D,
                                        heads(T, D)) for name in ("forward", "backward"))
    return forward, backward + sum(copy_seconds(gpu, size * TOKENS * WIDTH)
                                   for size in published.FLASH_ATTENTION_2_PASSES)


def our_kernels(D, figures):
    """{name: Kernel}; figures: the group "attention" of baseline.json."""
    def kernel(part):
        found = figures[f"{part.name} d{D}"]
        return Kernel(part.rows, part.columns, part.products, found["instructions per HMMA"],
                      found["MUFU per HMMA"], found["shared time"], found["blocks"], part.of_keys)
    return {part.name: kernel(part) for part in PARTS[D]}


def our_seconds(gpu, T, D, figures):
    """(forward, backward)"""
    forward, *backward = (kernel_seconds(gpu, kernel, T, D, heads(T, D))
                          for kernel in our_kernels(D, figures).values())
    return forward, sum(backward) + copy_seconds(gpu, DELTA_BYTES * TOKENS * WIDTH)


def teraflops(T, D, forward=None, backward=None):
    """Of what times are given for: the backward counts 2.5 times the forward's FLOPs."""
    weight = (forward is not None) + 2.5 * (backward is not None)
    return (weight * causal_flops(T, D, heads(T, D))
            / ((forward or 0) + (backward or 0)) / 1e12)


def check():
    """[(GPU, what, head dim, T, published, modelled TFLOP/s)]"""
    rows = []
    for (name, D), published_ones in published.FORWARD_AND_BACKWARD.items():
        for T, measured in zip(LENGTHS, published_ones):
            rows.append((name, "forward + backward", D, T, measured,
                         teraflops(T, D, *flash_attention_2_seconds(GPUS[name], T, D))))
    for (name, D), published_ones in published.FORWARD.items():
        for T, measured in published_ones.items():
            forward, _ = flash_attention_2_seconds(GPUS[name], T, D)
            rows.append((name, "forward", D, T, measured, teraflops(T, D, forward)))
    return rows


def ours(gpu, figures):
    """[(head dim, T, forward, backward, both, FlashAttention-2's three)], TFLOP/s, modelled."""
    rows = []
    for D in PARTS:
        for T in LENGTHS:
            both = [(teraflops(T, D, f), teraflops(T, D, backward=b), teraflops(T, D, f, b))
                    for f, b in (our_seconds(gpu, T, D, figures),
                                 flash_attention_2_seconds(gpu, T, D))]
            rows.append((D, T, *both[0], *both[1]))
    return rows


def run(args):
    print(__doc__)
    print("FlashAttention-2, causal, bf16, TFLOP/s")
    print(f"{'GPU':10} {'':18} {'head dim':>8} {'T':>6} {'published':>9} {'modelled':>8} "
          f"{'error':>6}")
    for name, what, D, T, measured, modelled in check():
        print(f"{name:10} {what:18} {D:8} {T:6} {measured:9.0f} {modelled:8.0f} "
              f"{modelled / measured - 1:+6.1%}")
    gpu = GPUS[args.gpu]
    print(f"\nllama_ext on {gpu.name}, causal, bf16, {TOKENS:,} tokens, heads x head dim "
          f"{WIDTH:,}: MODELLED TFLOP/s\n(in brackets FlashAttention-2, by the same model)")
    print(f"{'head dim':>8} {'T':>6} {'forward':>12} {'backward':>12} {'both':>12}")
    for D, T, *found in ours(gpu, baseline.load()["attention"]):
        pairs = [f"{mine:.0f} ({other:.0f})" for mine, other in zip(found[:3], found[3:])]
        print(f"{D:8} {T:6} {pairs[0]:>12} {pairs[1]:>12} {pairs[2]:>12}")
    bandwidth_report.run(gpu)
