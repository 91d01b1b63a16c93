"""How much of FSDP's communication runs while something is computed, with prefetch and without.

Two processes on this machine, joined by gloo, train a small Llama under torch.profiler, each with
one thread. Of the time for which collectives are under way, the share is measured during which the
main thread computes (an aten:: or llama_ext:: operator runs). That is scheduling: where the
processes have cores of their own and the network moves the data, it is time saved; on two cores
that also do gloo's copying, the step need not get shorter, and training on CPUs does without.
"""

import io
import json
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.profiler import ProfilerActivity, profile

from llama_ext import Llama, LlamaConfig, parallel
from llama_ext.files import write_atomically

PROCESSES, BATCH = 2, 2
KINDS = {"gloo:all_gather": "gather weights", "gloo:all_reduce": "reduce gradients"}


def record(config, steps=5):
    """{prefetch: [events of a step, ...]} of rank 0, the events as torch.profiler exports them."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_train, (folder, config.to_dict(), steps), PROCESSES)

        def events(path):
            trace = json.loads(path.read_bytes())["traceEvents"]
            return [event for event in trace if event.get("ph") == "X"]
        return {prefetch: [events(Path(folder, f"{prefetch}{step}")) for step in range(steps)]
                for prefetch in (True, False)}


def _train(rank, folder, shape, steps):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=PROCESSES)
    config = LlamaConfig.from_dict(shape)
    tokens = torch.randint(config.vocab_size, (BATCH, config.max_seq_len))
    for prefetch in (True, False):
        model = Llama(config, device="meta")
        parallel.parallelize(model, parallel.mesh(config), prefetch=prefetch)
        if prefetch:  # a CPU has no streams on which a gather runs by itself
            model._set_unshard_async_op(True)
        parallel.reset_parameters(model.to_empty(device="cpu"), 0)
        for step in range(-2, steps):  # two to warm up
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                model(tokens, tokens).backward()
            model.zero_grad()
            if rank == 0 and step >= 0:
                trace.export_chrome_trace(f"{folder}/{prefetch}{step}")
    dist.destroy_process_group()


def intervals(events):
    """{"compute": ..., "gather weights": ..., "reduce gradients": ...} of one step, each as sorted
    disjoint intervals (start, end) in ms."""
    def of(wanted):
        return union([(event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3)
                      for event in events if wanted(event["name"])])
    return {"compute": of(lambda name: name.startswith(("aten::", "llama_ext::"))),
            **{kind: of(lambda name, title=title: name == title)
               for title, kind in KINDS.items()}}


def union(intervals):
    """The same set of points as sorted disjoint intervals."""
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals):
    return sum(end - start for start, end in intervals)


def overlap(a, b):
    """Length of what two lists of disjoint intervals share."""
    return length(a) + length(b) - length(union([*a, *b]))


def share(steps, kinds=tuple(KINDS.values())):
    """Of the time of these collectives in all steps, the share during which something computes."""
    total = sum(length(step[kind]) for step in steps for kind in kinds)
    return sum(overlap(step[kind], step["compute"]) for step in steps for kind in kinds) / total


def duration(step):
    points = [point for kind in step.values() for interval in kind for point in interval]
    return max(points) - min(points)


def draw(path, results):
    """The first step with and without prefetch, as lines of time, into the PNG file `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    panels = figure.subplots(len(results), sharex=True)
    for axes, (prefetch, steps) in zip(panels, results.items()):
        begin = min(kind[0][0] for kind in steps[0].values())
        for row, kind in enumerate(reversed(steps[0].values())):
            axes.broken_barh([(start - begin, end - start) for start, end in kind],
                             (row - 0.4, 0.8), color=f"C{row}")
        axes.set_yticks(range(len(steps[0])), reversed(steps[0]))
        axes.set_title(f"prefetch {'on' if prefetch else 'off'}: {share(steps):.0%} of the "
                       "communication while something is computed", fontsize=10)
    panels[-1].set_xlabel("time in a step (ms)")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())


def run(args):
    config = LlamaConfig(dim=512, n_layers=6, n_heads=8, vocab_size=2048, max_seq_len=256)
    results = {prefetch: [intervals(events) for events in steps]
               for prefetch, steps in record(config).items()}
    print(f"training steps of {PROCESSES} processes (gloo, FSDP, one thread each), {BATCH} x "
          f"{config.max_seq_len} tokens, torch {torch.__version__}; share of the communication's "
          "time during which the main thread computes")
    for prefetch, steps in results.items():
        each = ", ".join(f"{kind} {share(steps, (kind,)):.0%}" for kind in KINDS.values())
        print(f"prefetch {'on ' if prefetch else 'off'} {share(steps):4.0%} ({each}); median step "
              f"{statistics.median(map(duration, steps)):.0f} ms")
    draw(args.out, results)
    print(f"picture: {args.out}")
