"""Command line of the benchmarks."""

import argparse
import sys

import torch

from llama_ext.errors import LlamaExtError

from . import (baseline, cases, compare, counts, memory, models, overlap, providers, run, virtual)
from .a100 import model, report
from .timing import DTYPES

OPS = list(providers.OURS)


def _command(commands, name, about, documented):
    """A subparser whose help begins with a module's docstring."""
    return commands.add_parser(name, help=about, description=documented.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text):
    """An argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _numbers(command, **numbers):
    for name, (default, about) in numbers.items():
        command.add_argument(f"--{name}", type=positive, default=default,
                             help=f"{about} (default: {default})")


def _timed(command, rounds):
    """The options of commands that time; those not given are None."""
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: fp32 bf16")
    command.add_argument("--rounds", type=positive, help=f"timing rounds (default: {rounds})")
    command.add_argument("--threads", type=positive, help="threads for every provider (default: "
                         f"{torch.get_num_threads()})")
    command.add_argument("--json", help="write every figure to this file")
    command.add_argument("--plots", help="draw pictures (PNG and SVG) into this folder")


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = _command(commands, "run", "every op beside its peers, on a CPU or GPU; or counted",
                       run)
    command.add_argument("--backend", choices=("cpu", "cuda", "vgpu"), default="cpu",
                         help="vgpu: nothing is timed; counts and modelled times of the CUDA "
                              "kernels on a virtual A100 (default: %(default)s)")
    command.add_argument("--ops", nargs="+", choices=OPS, metavar="OP",
                         help=f"some of {', '.join(OPS)} (default: all)")
    command.add_argument("--peers", nargs="+", metavar="PEER",
                         help=f"some of {', '.join(list(providers.PROVIDERS)[1:])} (default: all)")
    command.add_argument("--sizes", nargs="+", choices=(*cases.SIZES, cases.SWEEP),
                         help="shapes; sweep is attention over the sequence's length (default: "
                              "small, 7B and sweep on a CPU, all but 33B on a GPU)")
    _timed(command, run.DEFAULTS["rounds"])
    command.set_defaults(run=lambda args: (virtual if args.backend == "vgpu" else run).run(args))

    command = _command(commands, "models", "a whole model beside transformers", models)
    command.add_argument("--backend", choices=("cpu", "cuda"), default="cpu",
                         help="default: %(default)s")
    command.add_argument("--peers", nargs="+", choices=models.PROVIDERS[1:],
                         help="default: all")
    command.add_argument("--sizes", nargs="+", default=["small"], choices=models.SIZES,
                         help="default: small (512 wide, 8 layers, 8 heads, vocabulary 32,000)")
    command.add_argument("--layers", type=positive, help="default: the size's")
    _numbers(command, batch=(4, "sequences in a training step"),
             tokens=(512, "tokens in each of them"), prompt=(128, "tokens of the prompt"),
             new=(16, "further tokens"))
    _timed(command, models.DEFAULTS["rounds"])
    command.set_defaults(run=models.run)

    command = _command(commands, "compare", "two JSON files: what became faster or slower", compare)
    command.add_argument("old")
    command.add_argument("new")
    command.add_argument("--threshold", type=float, default=5.0,
                         help="per cent by which a row may be worse (default: %(default)s)")
    command.add_argument("--fail-worse", action="store_true", help="exit code 1 where one is worse")
    command.set_defaults(run=compare.run)

    command = _command(commands, "counts", "what the CUDA kernels ask of an A100, counted on the "
                       "virtual one", counts)
    command.add_argument("--ops", nargs="+", choices=sorted({case.op for case in counts.CASES}),
                         help="which ops (all when not given)")
    command.add_argument("--save", action="store_true",
                         help="renew benchmarks/baseline.json, which the tests compare with")
    command.set_defaults(run=lambda args: baseline.save() if args.save else counts.run(args))

    command = _command(commands, "a100", "modelled times of the kernels on an A100, and the "
                       "models' checks", report)
    command.add_argument("--gpu", choices=model.GPUS, default="A100-80GB",
                         help="which GPU (default: %(default)s)")
    command.set_defaults(run=report.run)

    command = _command(commands, "memory", "what a transformer block keeps and recomputes, in each "
                       "way to write it", memory)
    _numbers(command, dim=(1024, "width"), heads=(8, "heads"), batch=(1, "sequences"),
             tokens=(1024, "tokens in each"), rounds=(9, "timing rounds"),
             threads=(torch.get_num_threads(), "threads"))
    command.add_argument("--kv-heads", type=positive, help="default: as --heads")
    command.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"],
                         help="default: fp32 bf16")
    command.set_defaults(run=memory.run)

    command = _command(commands, "overlap", "share of FSDP's communication that runs while "
                       "something is computed", overlap)
    command.add_argument("--out", default="overlap.png",
                         help="picture of a step (default: %(default)s)")
    command.set_defaults(run=overlap.run)
    return parser


def main(arguments=None):
    """Exit code of the command line."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except LlamaExtError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
