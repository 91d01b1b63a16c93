"""The command line, `llama-ext` or `python -m llama_ext`: info, prepare, train, generate.

Each command's options are added, and its libraries imported, only when it is the one that runs.
Every foreseeable failure ends in one sentence on stderr. Exit codes: 2 for wrong options, 128 plus
the number of the signal that stopped the command, 1 for all else.
"""

import argparse
import dataclasses
import inspect
import json
import os
import signal
import sys
import typing

from .errors import LlamaExtError
from .info import info


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _info_options(parser):
    parser.set_defaults(run_command=_run_info)


def _run_info(options):
    print(json.dumps(info(), indent=2))


def _prepare_options(parser):
    from .prepare import SUFFIXES, prepare

    defaults = inspect.signature(prepare).parameters

    def add(to, name, text, **more):
        to.add_argument("--" + name.replace("_", "-"), default=defaults[name].default,
                        help=f"{text} (default: %(default)s)", **more)

    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a text file, a folder to search for text files, or the word stdlib: "
                             "the Python standard library's sources on this machine")
    parser.add_argument("--out", required=True, help="folder for the data set")
    vocabulary = parser.add_mutually_exclusive_group()
    add(vocabulary, "vocab_size", "pieces of the tokenizer that is trained on the text", type=int)
    vocabulary.add_argument("--tokenizer", metavar="FILE",
                            help="SentencePiece model to use instead (default: train one)")
    add(parser, "val_fraction", "share of the text held out for validation", type=float)
    add(parser, "shard_tokens", "tokens in a shard", type=int)
    add(parser, "seed", "of the choice of held-out documents", type=int)
    parser.add_argument("--suffixes", nargs="+", default=SUFFIXES, metavar="SUFFIX",
                        help=f"of the files taken from folders (default: {' '.join(SUFFIXES)})")
    parser.set_defaults(run_command=_run_prepare)


def _run_prepare(options):
    from .prepare import prepare

    meta = prepare(**options)
    for split in ("train", "val"):
        part = meta[split]
        print(f"{split}: {part['documents']:,} documents, {part['bytes']:,} bytes, "
              f"{part['tokens']:,} tokens in {len(part['shards'])} shards")
    skipped = ", ".join(f"{count} {why.replace('_', ' ')}"
                        for why, count in meta["skipped"].items())
    print(f"skipped files: {skipped}\ndata set: {options['out']}")


def _train_options(parser):
    from .train import TrainConfig

    for field in dataclasses.fields(TrainConfig):
        required = field.default is dataclasses.MISSING
        kind = next(iter(typing.get_args(field.type)), field.type)  # int of int | None
        text = field.metadata["help"]
        if not required and field.default is not None:
            text += " (default: %(default)s)"
        parser.add_argument("--" + field.name.replace("_", "-"), required=required, type=kind,
                            default=None if required else field.default, help=text,
                            choices=field.metadata["choices"])
    parser.set_defaults(run_command=_run_train)


def _run_train(options):
    from .train import TrainConfig, train

    stopped = train(TrainConfig(**options))["signal"]
    return 128 + stopped if stopped else 0


def _generate_options(parser):
    parser.add_argument("--run", required=True,
                        help="a run's folder, whose newest checkpoint is taken, or a checkpoint's")
    parser.add_argument("--prompt", default="", help="text to continue; - reads it from stdin "
                        "(default: none, the beginning of a new text)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add at most; "
                        "fewer where the text ends or fills the model's context "
                        "(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most "
                        "probable token; 1: as the model says (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the most probable "
                        "tokens that together have this probability (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="of the draws (default: another every time)")
    parser.add_argument("--int8", action="store_true", help="keep the weights of linear layers in "
                        "int8, quantised while they are loaded: a quarter of the memory of fp32")
    parser.set_defaults(run_command=_run_generate)


def _run_generate(options):
    from . import checkpoint
    from .generate import stream

    prompt = options["prompt"]
    prompt = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    try:
        prompt = prompt.decode()
    except UnicodeDecodeError as error:
        raise LlamaExtError(f"generate: --prompt: expected UTF-8 text, got byte "
                            f"{prompt[error.start]:#04x} at {error.start}") from None
    model, tokenizer = checkpoint.load_model(checkpoint.find(options["run"]),
                                             int8=options["int8"])
    ids = tokenizer.encode(prompt, bos=True)
    new_ids = stream(model, ids, options["max_new_tokens"], temperature=options["temperature"],
                     top_p=options["top_p"], seed=options["seed"], eos_id=tokenizer.eos_id)
    sys.stdout.reconfigure(errors="replace")  # of a terminal that cannot show every character
    print(prompt, end="", flush=True)
    for text in tokenizer.stream_decode(new_ids):
        print(text, end="", flush=True)
    print()


_COMMANDS = {
    "info": ("show versions and which kernels serve which tensors", _info_options),
    "prepare": ("turn text into a vocabulary and token shards", _prepare_options),
    "train": ("train a LLaMA on prepared text, or go on with a run", _train_options),
    "generate": ("let a trained model write", _generate_options),
}


def _parse(argv):
    parser = _Parser(prog="llama-ext", description="LLaMA kernels, training and generation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_options) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if argv[:1] == [name]:
            add_options(command)
    options = vars(parser.parse_args(argv))
    del options["command"]
    return options.pop("run_command"), options


def main(argv=None):
    """Run the command that `argv` (default: sys.argv[1:]) names; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run_command, options = _parse(argv)
        code = run_command(options)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except ModuleNotFoundError as error:
        return _fail(f"{argv[0]}: needs the Python package {error.name}: "
                     "pip install 'llama_ext[train]'", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at exit
        return _fail("stdout: the reader of the output has gone", 128 + signal.SIGPIPE)
    except LlamaExtError as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(f"{error.filename or 'stdout'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return _fail(f"{argv[0]}: expected enough memory, but none is left; a smaller model or "
                     "batch needs less", 1)


def _fail(message, code):
    print(f"llama-ext: {message}", file=sys.stderr, flush=True)
    return int(code)
