"""Command line of the benchmarks."""

import argparse
import json
import math
import os
import sys

import torch
from tqdm import tqdm

import llama_ext as lx
from llama_ext.memory import reuse_freed_memory, status

from . import baseline, counts, memory, models, overlap
from .a100 import model, report
from .cases import CASES
from .timing import DTYPES, measure

DIRECTIONS = ("forward", "forward+backward")


def ratio(results, direction):
    """Time of the fastest peer over ours: above 1, we are faster."""
    peers = {name: r[direction] for name, r in results.items() if name != "llama_ext"}
    best = min(peers, key=peers.get)
    return peers[best] / results["llama_ext"][direction], best


def geometric_mean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def run(args):
    reuse_freed_memory()
    torch.set_num_threads(args.threads)
    ops = list(dict.fromkeys(case.op for case in CASES))
    unknown = set(args.ops or ops) - set(ops)
    if unknown:
        sys.exit(f"benchmarks: --ops: expected some of {', '.join(ops)}, got {', '.join(unknown)}")
    cases = [(case, dtype) for case in CASES if case.op in (args.ops or ops)
             for dtype in args.dtypes]
    print(f"llama_ext {lx.__version__}, torch {torch.__version__}, CPU kernels "
          f"{lx.info()['cpu']['isa']}, {args.threads} threads; milliseconds, medians of "
          f"{args.rounds} interleaved rounds; freed memory {status()}")
    header = f"{'op':20} {'shape':26} {'dtype':5} {'direction':16} {'ours':>9} " \
             f"{'best peer':>20} {'ratio':>6}"
    rows, summary = [], {}
    for case, dtype in tqdm(cases, unit="case", disable=None):
        results = measure(case, DTYPES[dtype], args.rounds)
        rows.append({"op": case.op, "shape": case.shape, "dtype": dtype, "providers": results})
        for direction in DIRECTIONS:
            value, best = ratio(results, direction)
            summary.setdefault((case.op, dtype, direction), []).append(value)
            if header:
                tqdm.write(header, file=sys.stdout)
                header = None
            ours, peer = results["llama_ext"][direction], results[best][direction]
            tqdm.write(f"{case.op:20} {case.shape:26} {dtype:5} {direction:16} {ours * 1e3:9.3f} "
                       f"{f'{best} {peer * 1e3:.3f}':>20} {value:6.2f}", file=sys.stdout)
            sys.stdout.flush()
    print("\nGeometric means over shapes of (fastest peer's time / ours); above 1, we are faster")
    for (op, dtype, direction), values in summary.items():
        print(f"{op:20} {dtype:5} {direction:16} {geometric_mean(values):6.2f}")
    if args.json:
        part = f"{args.json}.part"
        with open(part, "w") as file:
            json.dump({"info": lx.info(), "rows": rows}, file, indent=1)
        os.replace(part, args.json)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="time the ops beside their peers, on the CPU",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("--ops", nargs="+", help="which ops (all when not given)")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"],
                         help="which dtypes")
    command.add_argument("--rounds", type=int, default=9, help="timing rounds")
    command.add_argument("--threads", type=int, default=torch.get_num_threads(),
                         help="threads for every provider")
    command.add_argument("--json", help="also write every figure to this file")
    command.set_defaults(run=run)
    command = commands.add_parser(
        "models", help="a whole model beside transformers: training step, generation",
        description=models.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--backend", choices=("cpu", "cuda"), default="cpu",
                         help="default: %(default)s")
    command.add_argument("--peers", nargs="+", choices=models.PROVIDERS[1:],
                         help="beside which (default: all)")
    command.add_argument("--sizes", nargs="+", default=["small"], choices=models.SIZES,
                         help="default: small (512 wide, 8 layers, 8 heads, vocabulary 32,000)")
    command.add_argument("--layers", type=int, help="default: the size's")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"],
                         help="default: fp32 bf16")
    for name, default, about in (
            ("batch", 4, "sequences in a training step"), ("tokens", 512, "in each of them"),
            ("prompt", 128, "tokens of the prompt"), ("new", 16, "further tokens"),
            ("rounds", 5, "timing rounds"),
            ("threads", torch.get_num_threads(), "for every provider")):
        command.add_argument(f"--{name}", type=int, default=default,
                             help=f"{about} (default: {default})")
    command.add_argument("--json", help="write every figure to this file")
    command.add_argument("--plots", help="draw pictures into this folder")
    command.set_defaults(run=models.run)
    command = commands.add_parser(
        "counts", help="count what the CUDA kernels ask of an A100, on the virtual one",
        description=counts.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--ops", nargs="+", choices=sorted({case.op for case in counts.CASES}),
                         help="which ops (all when not given)")
    command.add_argument("--save", action="store_true",
                         help="renew benchmarks/baseline.json, which the tests compare with")
    command.set_defaults(run=lambda args: baseline.save() if args.save else counts.run(args))
    command = commands.add_parser(
        "a100", help="modelled times of attention on an A100, and the model's check",
        description=report.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--gpu", choices=model.GPUS, default="A100-80GB",
                         help="which GPU (default: %(default)s)")
    command.set_defaults(run=report.run)
    command = commands.add_parser(
        "memory", help="what a transformer block keeps and recomputes, in each way to write it",
        description=memory.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"dim": 1024, "heads": 8, "batch": 1, "tokens": 1024, "rounds": 9,
                          "threads": torch.get_num_threads()}.items():
        command.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    command.add_argument("--kv-heads", type=int, help="default: as --heads")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"],
                         help="default fp32 bf16")
    command.set_defaults(run=memory.run)
    command = commands.add_parser(
        "overlap", help="share of FSDP's communication that runs while something is computed",
        description=overlap.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--out", default="overlap.png",
                         help="picture of a step (default: %(default)s)")
    command.set_defaults(run=overlap.run)
    args = parser.parse_args()
    sys.exit(args.run(args))


if __name__ == "__main__":
    main()
